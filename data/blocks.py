"""A source read for ever, in blocks of documents that are shuffled and tokenized together.

A block is so many training documents that follow one another in the source. Which those are, and in what order a block
hands them on, depends on the seed and on where the block is, and on nothing before it: to go on in the middle of a
stream it is enough to know where a block begins.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from data.documents import DocumentArrays
from data.encoding import Encoder
from data.errors import DataError
from data.order import BLOCK_ORDER, BLOCK_SIZE, permutation, random_fraction
from data.source import Cursor, Source

# A block of very long documents ends here, or it would not fit in memory.
BLOCK_BYTES = 1 << 28
# Blocks that wait, read and being tokenized, until they are asked for.
BLOCKS_AHEAD = 2


@dataclass(frozen=True)
class BlockStart:
    """Where a block begins: in the source, and in which pass over it."""

    epoch: int
    number: int  # of the block, within the epoch
    cursor: Cursor | None  # None: the source's first document


@dataclass(frozen=True)
class Block(DocumentArrays):
    """Tokenized documents in the order in which the stream hands them on."""

    start: BlockStart


@dataclass(frozen=True)
class BlockReader:
    """How a source becomes blocks."""

    source: Source
    is_held_out: Callable[[str], bool]  # by a document's identity
    encoder: Encoder
    boundary_id: int
    seed: int
    shuffle_documents: int

    def blocks(self, start: BlockStart) -> Iterator[Callable[[], Block]]:
        """The blocks from ``start`` on, without end; calling one waits until it is tokenized.

        Raises ``DataError`` where the source does, and for one that holds no training document.
        """
        epoch, number, cursor = start.epoch, start.number, start.cursor
        while True:
            reader = self.source.read(cursor)
            while True:
                begin = BlockStart(epoch, number, reader.cursor())
                documents: list[bytes] = []
                size, most = 0, self._documents_of(epoch, number)
                for document in reader:
                    if not document.content or self.is_held_out(document.identity):
                        continue
                    documents.append(document.content)
                    size += len(document.content)
                    if len(documents) == most or size >= BLOCK_BYTES:
                        break
                if not documents:
                    break
                yield self._started(begin, documents)
                number += 1
            if number == 0:
                raise DataError(
                    "data.source holds no document to train on; give a source with more text in it, or lower"
                    " data.held_out_fraction."
                )
            epoch, number, cursor = epoch + 1, 0, None

    def _documents_of(self, epoch: int, number: int) -> int:
        """How many documents a block takes. The first of an epoch is shorter by chance, so that documents which met
        in one epoch need not meet in the next."""
        if number or not epoch:
            return self.shuffle_documents
        return 1 + int(random_fraction(self.seed, BLOCK_SIZE, str(epoch)) * self.shuffle_documents)

    def _started(self, start: BlockStart, documents: list[bytes]) -> Callable[[], Block]:
        order = permutation(len(documents), self.seed, start.epoch, BLOCK_ORDER, start.number)
        encoded = self.encoder.submit([documents[document] for document in order])
        mark = np.array([self.boundary_id], dtype=np.uint32)

        def finish() -> Block:
            # A document without ids would be a mark alone.
            pieces = [ids for ids in encoded() if len(ids)]
            tokens = [piece for ids in pieces for piece in (mark, ids)]
            offsets = np.cumsum([0, *(len(ids) + 1 for ids in pieces)])
            return Block(np.concatenate(tokens) if tokens else np.zeros(0, np.uint32), offsets, start)

        return finish


class BackgroundBlocks:
    """The same blocks, read ahead by a thread."""

    def __init__(self, blocks: Iterator[Callable[[], Block]]) -> None:
        self._ready: queue.Queue[Callable[[], Block] | Exception] = queue.Queue(BLOCKS_AHEAD)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(blocks,), name="reads documents", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Callable[[], Block]]:
        return self

    def __next__(self) -> Callable[[], Block]:
        found = self._ready.get()
        if isinstance(found, Exception):
            raise found
        return found

    def close(self) -> None:
        """Ends the thread."""
        self._stopping.set()
        self._thread.join()

    def _run(self, blocks: Iterator[Callable[[], Block]]) -> None:
        try:
            for block in blocks:
                if not self._put(block):
                    return
        except Exception as error:  # handed to whoever reads
            self._put(error)

    def _put(self, what: Callable[[], Block] | Exception) -> bool:
        while not self._stopping.is_set():
            with contextlib.suppress(queue.Full):
                self._ready.put(what, timeout=0.1)
                return True
        return False
