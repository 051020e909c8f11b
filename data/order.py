"""The order of samples: a pure function of (seed, epoch), and plain slicing for who reads what.

The position of a run is one number, the count of samples read so far. Nothing here depends on the number of
ranks, workers or micro-batches, so a run continues with exactly the next sample under any other layout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from data.errors import DataError

# Which permutation of an epoch a random stream is for.
DOCUMENT_ORDER = 0
SAMPLE_ORDER = 1
MIXTURE_OFFSETS = 2
BLOCK_ORDER = 3
BLOCK_SIZE = 4
BLOCK_SAMPLES = 5


def permutation(size: int, seed: int, epoch: int, purpose: int, *further: int) -> np.ndarray:
    """(size,) int64: a uniformly random order of range(size), for these numbers.

    It sorts raw 64-bit outputs of Philox, which NumPy promises to keep; the algorithm behind
    ``Generator.permutation`` may change between versions, and with it the data order of a resumed run.
    """
    random = np.random.Philox(np.random.SeedSequence([seed, epoch, purpose, *further])).random_raw(size)
    return np.argsort(random, kind="stable")


def random_fraction(seed: int, purpose: int, name: str) -> float:
    """A number in (0, 1) that depends on the arguments alone."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{name}".encode()).digest()
    return ((int.from_bytes(digest[:8], "big") >> 11) + 0.5) / 2**53


def rank_share(
    indices: Sequence[int], micro_batch_size: int, data_parallel_rank: int, data_parallel_size: int
) -> list[list[int]]:
    """The micro-batches of one data-parallel rank: a consecutive share of ``indices`` in equal parts.

    The shares of all ranks, one after another, are ``indices`` itself. Raises ``DataError`` when ``indices``
    does not divide evenly or the rank does not exist.
    """
    if not 0 <= data_parallel_rank < data_parallel_size:
        raise DataError(f"data-parallel rank {data_parallel_rank} is not one of {data_parallel_size} ranks.")
    if micro_batch_size < 1 or len(indices) % (micro_batch_size * data_parallel_size):
        raise DataError(
            f"a global batch of {len(indices)} samples does not divide into micro-batches of"
            f" {micro_batch_size} on {data_parallel_size} data-parallel ranks; make it a multiple of"
            f" {max(micro_batch_size, 1) * data_parallel_size}."
        )
    share = len(indices) // data_parallel_size
    start = data_parallel_rank * share
    return [list(indices[first : first + micro_batch_size]) for first in range(start, start + share, micro_batch_size)]


def sample_indices(first: int, count: int, left_out: Sequence[tuple[int, int]]) -> list[int]:
    """The next ``count`` indices from ``first`` on that lie in none of the ranges ``left_out``.

    ``left_out``: half-open, sorted, apart from each other.
    """
    found: list[int] = []
    for start, end in left_out:
        found += range(first, min(start, first + count - len(found)))
        if len(found) == count:
            return found
        first = max(first, end)
    return found + list(range(first, first + count - len(found)))


def first_of_last(end: int, count: int, left_out: Sequence[tuple[int, int]]) -> int:
    """The first of the last ``count`` indices below ``end`` that lie in none of the ranges ``left_out``; at least 0."""
    for start, stop in reversed(left_out):
        if stop > end:
            end = min(end, start)
            continue
        if end - stop >= count:
            break
        count, end = count - (end - stop), start
    return max(end - count, 0)


def merged(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Half-open ranges, sorted, and those that meet or overlap made one."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found
