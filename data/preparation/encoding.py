"""Groups of documents to stored ids, in order: in this process, or in several behind it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np

from data.config import TokenizerConfig
from data.documents import SPLITS, token_dtype
from data.errors import DataError
from data.indexed_format import LONGEST_SEQUENCE
from data.preparation.reading import Group
from data.processes import start_processes
from data.source import Split
from data.tokenizers import Tokenizer, open_tokenizer

# Text that is tokenized in this process before others are started, which takes each of them a second or so.
INLINE_BYTES = 8 << 20


@dataclass(frozen=True)
class EncodedPart:
    """What a group has of one split."""

    tokens: np.ndarray  # ids of the documents one behind the other, each with its mark in front
    lengths: np.ndarray  # (documents,) int32, marks counted
    bytes: int  # of the raw documents
    empty_documents: int  # without any id; left out
    invalid_utf8_documents: int


EncodedGroup = dict[Split, EncodedPart]


def encode_group(group: Group, tokenizer: Tokenizer, one_by_one: bool = False) -> EncodedGroup:
    """Tokenizes a group. ``one_by_one``: documents are given singly, which no library spreads over threads.

    Raises ``DataError`` where the tokenizer does, and for a document that is too long for the format.
    """
    dtype = token_dtype(tokenizer.stored_vocab_size)
    mark = np.array([tokenizer.boundary_id], dtype=dtype)
    if one_by_one:
        encoded = [tokenizer.encode_many([content])[0] for content in group.contents]
    else:
        encoded = tokenizer.encode_many(group.contents) if group.contents else []
    parts: EncodedGroup = {}
    for split in SPLITS:
        pieces: list[np.ndarray] = []
        lengths: list[int] = []
        raw_bytes = empty = invalid = 0
        for content, its_split, ids in zip(group.contents, group.splits, encoded, strict=True):
            if its_split != split:
                continue
            if not len(ids):
                empty += 1
                continue
            if len(ids) >= LONGEST_SEQUENCE:
                raise DataError(
                    f"a document of data.source has {len(ids)} tokens, but {LONGEST_SEQUENCE - 1} is the most that the"
                    " indexed format holds; cut it into documents (text_files has document_separator)."
                )
            pieces += [mark, ids]
            lengths.append(len(ids) + 1)
            raw_bytes += len(content)
            invalid += tokenizer.reads_text and not _is_utf8(content)
        tokens = np.concatenate(pieces, dtype=dtype, casting="unsafe") if pieces else np.zeros(0, dtype)
        parts[split] = EncodedPart(tokens, np.array(lengths, dtype=np.int32), raw_bytes, empty, invalid)
    return parts


class GroupEncoder:
    """Tokenizes groups in this process first, and in several once there is enough text. A context manager."""

    def __init__(self, tokenizer: Tokenizer, config: TokenizerConfig, workers: int) -> None:
        """
        Args:
            tokenizer: which this process uses.
            config: by which the other processes open the same one.
            workers: processes; 0 does everything in this one.
        """
        self._tokenizer, self._config, self._workers = tokenizer, config, workers
        self._inline_bytes = 0
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> GroupEncoder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def encode(
        self, groups: Iterable[Group], is_wanted: Callable[[Group], bool]
    ) -> Iterator[tuple[Group, EncodedGroup | None]]:
        """The groups in their order, each with its ids, or with None where it is not wanted.

        At most two groups for each process wait at any time, with their text or their ids.
        Raises ``DataError`` where the tokenizer does, or where a process was killed.
        """
        waiting: deque[tuple[Group, Future[EncodedGroup] | EncodedGroup | None]] = deque()
        for group in groups:
            waiting.append((group, self._begin(group) if is_wanted(group) else None))
            while waiting and (len(waiting) > 2 * self._workers or not isinstance(waiting[0][1], Future)):
                yield self._finished(*waiting.popleft())
        while waiting:
            yield self._finished(*waiting.popleft())

    def _begin(self, group: Group) -> Future[EncodedGroup] | EncodedGroup:
        if self._pool is None and self._workers and self._inline_bytes >= INLINE_BYTES:
            arguments = (self._config, self._tokenizer.fingerprint())
            self._pool = start_processes(self._workers, _remember_tokenizer, *arguments)
        if self._pool is None:
            self._inline_bytes += sum(map(len, group.contents))
            return encode_group(group, self._tokenizer)
        try:
            return self._pool.submit(_encode_in_process, group)
        except BrokenProcessPool as error:
            raise _process_died() from error

    def _finished(
        self, group: Group, encoded: Future[EncodedGroup] | EncodedGroup | None
    ) -> tuple[Group, EncodedGroup | None]:
        if not isinstance(encoded, Future):
            return group, encoded
        try:
            return group, encoded.result()
        except BrokenProcessPool as error:
            raise _process_died() from error


def _process_died() -> DataError:
    return DataError(
        "a process that tokenizes was ended from outside, perhaps for want of memory; start again with fewer workers:"
        " finished shards are kept."
    )


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


# In a process that tokenizes: how to open its tokenizer, which is done with the first group so that errors arrive.
_tokenizer_source: tuple[TokenizerConfig, str] | None = None
_tokenizer: Tokenizer | None = None


def _remember_tokenizer(config: TokenizerConfig, fingerprint: str) -> None:
    global _tokenizer_source
    _tokenizer_source = (config, fingerprint)


def _encode_in_process(group: Group) -> EncodedGroup:
    global _tokenizer
    if _tokenizer is None:
        assert _tokenizer_source is not None
        config, fingerprint = _tokenizer_source
        opened = open_tokenizer(config)
        if opened.fingerprint() != fingerprint:
            raise DataError("data.tokenizer was changed while it was being used; start again.")
        _tokenizer = opened
    return encode_group(group, _tokenizer, one_by_one=True)
