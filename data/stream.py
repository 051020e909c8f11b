"""Samples of a source that is tokenized while the run reads it.

Sample i is a function of the source, the seed and i, as for a source that is prepared; but to find it, everything
before it has to be tokenized, so the samples are read in order. A bookmark, which says where the block of a sample
begins, spares another process that work: a checkpoint holds one beside the count of samples.

The stream never ends: the last documents of one epoch and the first of the next may share a sample, and nothing is
left out.
"""

from __future__ import annotations

import bisect
import json
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from data.batch import Rows, SampleFormat
from data.best_fit import Packing
from data.blocks import BackgroundBlocks, Block, BlockReader, BlockStart
from data.documents import TokenizedDocuments, token_dtype
from data.errors import DataError
from data.order import BLOCK_SAMPLES, permutation
from data.packing import SourceSamples
from data.preparation.encoding import encode_group
from data.preparation.memory import MemorySplit
from data.preparation.reading import Group
from data.source import Source
from data.splitting import held_out
from data.tokenizers import Tokenizer

# So many places in the stream are remembered; an older one is looked for from the source's beginning.
_KNOWN_BLOCKS = 2048


@dataclass(frozen=True)
class _PackedBlock:
    """Whole documents of one block in samples; they are in random order already, and so are the samples here."""

    block: Block
    packing: Packing
    order: np.ndarray  # (samples,)

    def rows(self, sample: int, boundary_id: int) -> Rows:
        """One sample of the block."""
        pieces = self.packing.pieces(self.packing.by_length_as_stored, int(self.order[sample]))
        return self.packing.read(self.block, [pieces], boundary_id)


@dataclass(frozen=True)
class _Placed:
    """A block of the stream, and which part of the stream it is.

    The stream is counted in tokens where documents are concatenated, and in samples where they are packed whole.
    """

    block: Block
    begin: int
    end: int
    packed: _PackedBlock | None = None


class StreamedSamples(SourceSamples):
    """Training samples of a stream; ``rows`` is meant to be called for indices that rise."""

    samples_per_epoch = None

    def __init__(
        self, reader: BlockReader, format: SampleFormat, packing: Literal["concatenate", "best_fit"], background: bool
    ) -> None:
        """``background``: whether a thread reads ahead."""
        self.reader, self.format = reader, format
        self._is_packed, self._background = packing == "best_fit", background
        # Where each block begins, in the stream and in the source, from the one on that was opened first.
        self._begins, self._starts = [0], [BlockStart(0, 0, None)]
        self._placed: deque[_Placed] = deque()  # blocks at hand, one behind the other
        self._next_begin = 0
        self._blocks: Iterator[Callable[[], Block]] | None = None
        self._lock = threading.Lock()

    def rows(self, indices: list[int]) -> Rows:
        write = self._write_packed if self._is_packed else self._write_concatenated
        rows = self.format.padding(len(indices))
        if self._is_packed:
            rows = Rows(rows.tokens, rows.valid, np.zeros(rows.tokens.shape, dtype=bool))
        with self._lock:
            for row, index in enumerate(indices):
                if index < 0:
                    raise IndexError(f"sample {index}: samples are counted from 0")
                begin, end = self._span(index)
                if self._blocks is None or begin < (self._placed[0].begin if self._placed else self._next_begin):
                    self._open_before(begin)
                while self._next_begin < end:
                    self._read_block()
                    while self._placed and self._placed[0].end <= begin:
                        self._placed.popleft()
                write(rows, row, begin, end)
        return rows

    def first_tokens(self, limit: int) -> np.ndarray:
        """(at most ``limit``,) int64: training tokens from the source's first document on, once through."""
        pieces, found = [], 0
        for started in self.reader.blocks(BlockStart(0, 0, None)):
            block = started()
            if block.start.epoch or found >= limit:
                break
            pieces.append(block.tokens[: limit - found].astype(np.int64))
            found += len(pieces[-1])
        return np.concatenate(pieces)

    def epochs(self, position: int) -> float:
        """How many times the source was read through whole by the first ``position`` samples."""
        with self._lock:
            return float(self._starts[self._place_before(self._span(position)[0])].epoch)

    def bookmark(self, position: int) -> dict[str, Any]:
        with self._lock:
            place = self._place_before(self._span(position)[0])
            return asdict(self._starts[place]) | {"begin": self._begins[place]}

    def go_on(self, bookmark: dict[str, Any]) -> None:
        """Takes a bookmark that another process made. Raises ``DataError`` for one that says no place."""
        numbers = [bookmark.get(name) for name in ("begin", "epoch", "number")]
        if "cursor" not in bookmark or not all(type(number) is int and number >= 0 for number in numbers):
            raise DataError(
                f"the bookmark {json.dumps(bookmark)[:200]} says no place in a stream (begin, epoch and number, from 0,"
                " and cursor); it was damaged: use another checkpoint."
            )
        with self._lock:
            self._close_blocks()
            self._begins = numbers[:1]
            self._starts = [BlockStart(numbers[1], numbers[2], bookmark["cursor"])]

    def close(self) -> None:
        with self._lock:
            self._close_blocks()
        self.reader.encoder.close()

    def _span(self, index: int) -> tuple[int, int]:
        """The part of the stream that a sample reads."""
        length = self.format.sequence_length
        return (index, index + 1) if self._is_packed else (index * length, (index + 1) * length + 1)

    def _place_before(self, begin: int) -> int:
        """The last block known to begin at ``begin`` or before."""
        return max(bisect.bisect_right(self._begins, begin) - 1, 0)

    def _open_before(self, begin: int) -> None:
        """Reads on from the block of ``begin``, or from the source's beginning where nobody knows that block."""
        self._close_blocks()
        if begin < self._begins[0]:
            self._begins, self._starts = [0], [BlockStart(0, 0, None)]
        place = self._place_before(begin)
        del self._begins[place + 1 :], self._starts[place + 1 :]
        self._next_begin = self._begins[place]
        blocks = self.reader.blocks(self._starts[place])
        self._blocks = BackgroundBlocks(blocks) if self._background else blocks

    def _close_blocks(self) -> None:
        if isinstance(self._blocks, BackgroundBlocks):
            self._blocks.close()
        self._blocks = None
        self._placed.clear()

    def _read_block(self) -> None:
        assert self._blocks is not None
        try:
            block = next(self._blocks)()
        except Exception:
            # Whoever asks again is to find the reading begun anew, not at an end that looks like the source's.
            self._close_blocks()
            raise
        begin = self._next_begin
        if begin > self._begins[-1]:
            self._begins.append(begin)
            self._starts.append(block.start)
            # The oldest are not forgotten one by one: that would move the whole list each time.
            if len(self._begins) > 2 * _KNOWN_BLOCKS:
                del self._begins[:_KNOWN_BLOCKS], self._starts[:_KNOWN_BLOCKS]
        if not len(block.tokens):
            if block.start.epoch > self._starts[-1].epoch + 1:
                raise DataError("the tokenizer makes no token of any document of data.source; give other text.")
            return
        packed, size = None, len(block.tokens)
        if self._is_packed:
            packed = self._packed(block)
            size = packed.packing.samples
        self._placed.append(_Placed(block, begin, begin + size, packed))
        self._next_begin = begin + size

    def _packed(self, block: Block) -> _PackedBlock:
        packing = Packing(block.lengths, self.format.sequence_length + 1)
        start = block.start
        order = permutation(packing.samples, self.reader.seed, start.epoch, BLOCK_SAMPLES, start.number)
        return _PackedBlock(block, packing, order)

    def _write_concatenated(self, rows: Rows, row: int, begin: int, end: int) -> None:
        for placed in self._placed:
            first, last = max(begin, placed.begin), min(end, placed.end)
            if first < last:
                part = placed.block.tokens[first - placed.begin : last - placed.begin]
                rows.tokens[row, first - begin : last - begin] = part
        rows.valid[row] = end - begin - 1

    def _write_packed(self, rows: Rows, row: int, begin: int, end: int) -> None:
        placed = next(placed for placed in self._placed if placed.begin <= begin < placed.end)
        assert placed.packed is not None
        found = placed.packed.rows(begin - placed.begin, self.format.boundary_id)
        rows.tokens[row], rows.valid[row], rows.starts[row] = found.tokens[0], found.valid[0], found.starts[0]


def first_held_out(source: Source, tokenizer: Tokenizer, fraction: float, tokens: int) -> TokenizedDocuments:
    """The first held-out documents of a source, so many that they make ``tokens`` tokens, or all there are.

    Raises ``DataError`` where there is none.
    """
    split, found = MemorySplit(), 0
    for document in source.documents():
        if not held_out(document.identity, fraction):
            continue
        part = encode_group(Group(0, [document.content], ["held_out"]), tokenizer)["held_out"]
        split.add(part)
        found += len(part.tokens)
        if found >= tokens:
            break
    split.end_shard()
    if not found:
        raise DataError(
            f"no document of data.source falls into the held-out split at data.held_out_fraction {fraction}; raise the"
            " fraction or give more documents."
        )
    return split.documents(token_dtype(tokenizer.stored_vocab_size))
