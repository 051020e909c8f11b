"""Which documents were there before: 16 bytes of memory for each."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

DIGEST_BYTES = 16
_TYPE = f"S{DIGEST_BYTES}"


def digest_of(content: bytes) -> bytes:
    """A digest of 128 bits: among 10^12 different documents two share one with a probability of 10^-15."""
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


class SeenDigests:
    """A growing set of digests.

    It is kept as sorted arrays of rising length, as a log-structured merge tree is: 16 bytes for each digest, and as
    many again while two arrays are merged.
    """

    def __init__(self) -> None:
        self._runs: list[np.ndarray] = []

    def add(self, digests: Iterable[bytes]) -> np.ndarray:
        """(number of digests,) bool: which were there before, or stand earlier in ``digests``."""
        added = np.frombuffer(b"".join(digests), dtype=_TYPE)
        repeated = np.ones(len(added), dtype=bool)
        different, first_places = np.unique(added, return_index=True)
        new = np.ones(len(different), dtype=bool)
        for run in self._runs:
            place = np.minimum(np.searchsorted(run, different), len(run) - 1)
            new &= run[place] != different
        repeated[first_places[new]] = False
        if new.any():
            self._append(different[new])
        return repeated

    def _append(self, run: np.ndarray) -> None:
        self._runs.append(run)
        while len(self._runs) > 1 and len(self._runs[-2]) <= 2 * len(self._runs[-1]):
            merged = np.concatenate(self._runs[-2:])
            # Two sorted halves: what "stable" stands for here merges them without sorting anew.
            merged.sort(kind="stable")
            self._runs[-2:] = [merged]
