"""Saves that a thread writes while training goes on, at most one at a time.

The thread runs ``write_checkpoint``, the same protocol as without it: every rank writes and fsyncs its shards, rank 0
writes the manifest once all have, and one rename completes the checkpoint. Three decisions:

* **A thread, not a process.** Its work is writing, forcing to disk and hashing, in which Python lets other threads run
  (safetensors does from 0.8 on), so a process of its own would gain nothing. It ends with the process that it belongs
  to, so that no writer of a killed run can meddle with the run that is resumed; and it needs neither a fork beside
  CUDA nor memory shared with another process.
* **Ranks agree over a gloo group of their own**, made for these threads alone. Collectives of one group must come in
  one order on every rank, which two threads cannot promise, and NCCL would wait for the GPU. Files as a barrier would
  need no group, but a rank whose disk is full cannot leave a file that says so.
* **A failure is told, never raised.** Training is right without the checkpoint, and earlier ones are untouched.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pretrain.checkpoint.directory import prune_checkpoints
from pretrain.checkpoint.format import CheckpointError
from pretrain.checkpoint.host_copies import HostCopies
from pretrain.checkpoint.shards import TensorPiece
from pretrain.checkpoint.writer import write_checkpoint
from pretrain.parallel.agreement import any_rank

logger = logging.getLogger(__name__)

# As long as other ranks wait for a rank whose disk is slow.
TIME_LIMIT = timedelta(minutes=30)


@dataclass(frozen=True)
class SaveOutcome:
    """How a save ended.

    Attributes:
        step: that was saved.
        path: the checkpoint; None where there is none.
        error: what went wrong; None where nothing did.
        stalled: seconds that training waited, for copies and for a save before this one.
        seconds: from the call until the checkpoint was complete.
    """

    step: int
    path: Path | None
    error: str | None
    stalled: float
    seconds: float


class BackgroundWriter:
    """Writes checkpoints of one run beside its training.

    Args:
        run_checkpoints: directory that holds all checkpoints of the run.
        keep_last, keep_every: which of them stay, see ``prune_checkpoints``; others go once a new one is complete.
        device: that training computes on.
        copies: where pieces are kept meanwhile; by default memory of its own.
    """

    def __init__(
        self,
        run_checkpoints: Path,
        keep_last: int,
        keep_every: int | None,
        device: torch.device,
        copies: HostCopies | None = None,
    ) -> None:
        self.run_checkpoints = run_checkpoints
        self.keep_last, self.keep_every = keep_last, keep_every
        self.device = device
        self.copies = copies or HostCopies(device)
        self._group = _group_of_writers(renew=False)
        self._group_is_broken = False
        self._thread: threading.Thread | None = None
        self._outcome: SaveOutcome | None = None

    def start(
        self, step: int, pieces: Iterator[TensorPiece], state: Mapping[str, Any], resumed_from: int | None, began: float
    ) -> None:
        """Copies what is to be saved and lets a thread write it; every rank calls it, with no save in flight.

        Args:
            state: must not change afterwards.
            began: ``time.perf_counter()`` of when training began to wait.
        """
        if self._thread is not None:
            raise RuntimeError("a save is in flight; wait for it before the next")
        if self._group is not None and any_rank(self._group_is_broken, self.device):
            self._group, self._group_is_broken = _group_of_writers(renew=True), False
        copies = self.copies.take(pieces)
        stalled = time.perf_counter() - began
        ended = f"step {step} could not be saved: its thread was ended"
        self._outcome = SaveOutcome(step, None, ended, stalled, stalled)
        # Whoever interrupts the process at once does not wait for it.
        self._thread = threading.Thread(
            target=self._write, args=(step, copies, state, resumed_from, began, stalled), name="checkpoint", daemon=True
        )
        self._thread.start()

    @property
    def is_writing(self) -> bool:
        """Whether a save is in flight whose files are not complete yet."""
        return self._thread is not None and self._thread.is_alive()

    def take_outcome(self, wait: bool) -> SaveOutcome | None:
        """How the save in flight ended, once; None where there is none, or where it goes on and ``wait`` is false."""
        if self._thread is None or (self._thread.is_alive() and not wait):
            return None
        self._thread.join()
        self._thread = None
        return self._outcome

    def _write(
        self,
        step: int,
        copies: Iterator[TensorPiece],
        state: Mapping[str, Any],
        resumed_from: int | None,
        began: float,
        stalled: float,
    ) -> None:
        path, error = None, None
        try:
            path = write_checkpoint(
                self.run_checkpoints,
                step,
                copies,
                dict(state),
                resumed_from=resumed_from,
                copy_pieces=False,
                group=self._group,
            )
        except CheckpointError as failure:
            error = str(failure)
        except Exception as failure:
            # Other ranks did not answer: what their group still has under way cannot be told from what comes next.
            self._group_is_broken = True
            error = (
                f"step {step} could not be saved in {self.run_checkpoints}: {type(failure).__name__}: {failure}. "
                f"Earlier checkpoints are untouched"
            )
        seconds = time.perf_counter() - began
        if path is not None and (self._group is None or dist.get_rank() == 0):
            try:
                prune_checkpoints(self.run_checkpoints, self.keep_last, self.keep_every)
            except OSError as failure:
                logger.warning("%s: old checkpoints could not be removed: %s", self.run_checkpoints, failure)
        self._outcome = SaveOutcome(step, path, error, stalled, seconds)


_groups: dict[dist.ProcessGroup, dist.ProcessGroup] = {}


def _group_of_writers(renew: bool) -> dist.ProcessGroup | None:
    """All ranks, joined by gloo for these threads alone; made once for a process, or anew. Collective.

    An earlier group that was broken stays as it is: another rank's thread may still wait in it.
    """
    if not dist.is_initialized():
        return None
    everyone = dist.group.WORLD
    if renew or everyone not in _groups:
        _groups[everyone] = dist.new_group(backend="gloo", timeout=TIME_LIMIT)
    return _groups[everyone]
