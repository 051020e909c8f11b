"""Text to ids in the order of the documents, in this process or in several behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool

import numpy as np

from data.config import TokenizerConfig
from data.errors import DataError
from data.processes import start_processes
from data.tokenizers import Tokenizer, open_tokenizer

# Documents go to a process in groups of about this many bytes.
GROUP_BYTES = 1 << 20

_tokenizer: Tokenizer | None = None


class Encoder:
    """Encodes groups of documents; a result is there when it is asked for."""

    def __init__(self, tokenizer: Tokenizer, config: TokenizerConfig, workers: int) -> None:
        """``workers``: processes; 0 encodes in this one. Each opens the tokenizer that ``config`` describes."""
        self._tokenizer = tokenizer
        self._pool = start_processes(workers, _open_in_process, config) if workers else None

    def submit(self, documents: Sequence[bytes]) -> Callable[[], list[np.ndarray]]:
        """Starts encoding ``documents``; calling the result waits for their ids, without marks.

        The call raises ``DataError`` where the tokenizer does, or where its process was killed.
        """
        groups = _groups(documents)
        if self._pool is None:
            return lambda: [ids for group in groups for ids in self._tokenizer.encode_many(group)]
        try:
            encoded = [self._pool.submit(_encode, group) for group in groups]
        except BrokenProcessPool as error:
            raise _process_died() from error
        return lambda: _gathered(encoded)

    def close(self) -> None:
        """Ends the processes; what they had not begun is dropped."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


def _groups(documents: Sequence[bytes]) -> list[list[bytes]]:
    groups: list[list[bytes]] = []
    size = GROUP_BYTES
    for document in documents:
        if size >= GROUP_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(document)
        size += len(document)
    return groups


def _gathered(encoded: list[Future[list[np.ndarray]]]) -> list[np.ndarray]:
    try:
        return [ids for group in encoded for ids in group.result()]
    except BrokenProcessPool as error:
        raise _process_died() from error


def _process_died() -> DataError:
    return DataError(
        "a process that tokenizes was ended from outside, perhaps for want of memory; lower data.stream.workers or"
        " data.stream.shuffle_documents."
    )


def _open_in_process(config: TokenizerConfig) -> None:
    global _tokenizer
    _tokenizer = open_tokenizer(config)


def _encode(documents: list[bytes]) -> list[np.ndarray]:
    assert _tokenizer is not None
    return _tokenizer.encode_many(documents)
