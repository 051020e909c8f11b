"""Writing a checkpoint: every rank streams its pieces into shards, and one rename makes them a checkpoint.

Order of events: temporary directory, shards (each fsynced), ``state.json``, ``manifest.json`` last, fsync
of the directory, rename, fsync of the parent. A process killed at any point leaves either no checkpoint
for this step or a complete one, and never touches an earlier one.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pretrain.checkpoint.directory import (
    checkpoint_name,
    fsync_directory,
    remove_stale_temporaries,
    temporary_name,
    verify_checksums_of,
)
from pretrain.checkpoint.format import (
    MANIFEST_FILE,
    STATE_FILE,
    CheckpointError,
    Manifest,
    ShardRecord,
    check_manifest,
    manifest_to_json,
    read_manifest,
)
from pretrain.checkpoint.shards import ShardStream, TensorPiece, write_durably
from pretrain.errors import InputError

logger = logging.getLogger(__name__)

DEFAULT_MAX_SHARD_BYTES = 2 * 1024**3


def write_checkpoint(
    run_checkpoints: Path,
    step: int,
    pieces: Iterable[TensorPiece],
    state: dict[str, Any],
    *,
    resumed_from: int | None = None,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    copy_pieces: bool = True,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Save one checkpoint; collective over ``group`` when ``torch.distributed`` is initialised.

    ``pieces`` is consumed lazily and always to its end, also on a rank whose disk is full, because gathering
    a piece may itself be a collective that the other ranks wait in. A rank holds at most about
    ``max_shard_bytes`` (or one piece, if that is larger) in memory at a time.

    Args:
        run_checkpoints: directory that holds all checkpoints of the run, on a filesystem all ranks share.
        step: number of optimizer steps done.
        pieces: this rank's pieces, possibly none. Each element of each tensor comes from exactly one rank.
        state: any JSON dictionary (tuples come back as lists); that of rank 0 is saved.
        resumed_from: the step this process was resumed from, if any. Saving that step again is no error.
        max_shard_bytes: bound on the tensor bytes of one shard file.
        copy_pieces: whether a piece may change after it was drawn; else none is copied again, and a rank holds no
            more than what it gave.
        group: all ranks; the default group if ``None``. A thread beside training needs one of its own.

    Returns:
        The checkpoint's directory. If a complete checkpoint of this step exists and is the same point of the
        same run (equal ``state``, or the one resumed from), it is left as it is and reported in the log.

    Raises:
        CheckpointError: on all ranks, with the same message; nothing is left behind, and earlier checkpoints
            are untouched.
    """
    run_checkpoints = Path(run_checkpoints)
    rank = dist.get_rank() if _distributed() else 0
    target = run_checkpoints / checkpoint_name(step)
    temporary = run_checkpoints / temporary_name(step)

    error, state_text, keep_existing = None, "", False
    if rank == 0:
        try:
            state_text = _state_to_json(state)
            keep_existing = _same_checkpoint_exists(target, step, state_text, resumed_from)
            if not keep_existing:
                _prepare(run_checkpoints, temporary)
        except Exception as failure:  # every failure must reach the other ranks, else they wait for ever
            error = _describe_failure(failure)
    # Rank 0 decides for all whether there is anything to write.
    keep_existing = _exchange((error, keep_existing), step, temporary, group)[0][1]
    if keep_existing:
        logger.warning("%s is already complete: it was left as it is", target)
        return target

    shards, error = _write_shards(ShardStream(temporary, rank, max_shard_bytes, copy_pieces), pieces)
    gathered = _exchange((error, shards), step, temporary, group)

    error = None
    if rank == 0:
        try:
            _publish(temporary, target, step, state_text, [shard for _, part in gathered for shard in part])
        except Exception as failure:
            error = _describe_failure(failure)
    _exchange((error, None), step, temporary, group)
    return target


def _write_shards(stream: ShardStream, pieces: Iterable[TensorPiece]) -> tuple[list[ShardRecord], str | None]:
    """Write this rank's shards. After a failure the remaining pieces are still drawn, and dropped."""
    iterator: Iterator[TensorPiece] = iter(pieces)
    error: str | None = None
    while True:
        try:
            piece = next(iterator)
        except StopIteration:
            break
        except Exception as failure:
            return [], error or f"gathering a tensor failed: {_describe_failure(failure)}"
        if error is None:
            try:
                stream.add(piece)
            except Exception as failure:
                error = _describe_failure(failure)
                stream.clear()
    if error is None:
        try:
            stream.flush()
        except Exception as failure:
            error = _describe_failure(failure)
    return ([], error) if error else (stream.shards, None)


def _prepare(run_checkpoints: Path, temporary: Path) -> None:
    created = not run_checkpoints.exists()
    run_checkpoints.mkdir(parents=True, exist_ok=True)
    if created:
        fsync_directory(run_checkpoints.parent)
    remove_stale_temporaries(run_checkpoints)
    temporary.mkdir()


def _same_checkpoint_exists(target: Path, step: int, state_text: str, resumed_from: int | None) -> bool:
    """Whether ``target`` is complete and the same point of the same run; raise if complete but another."""
    try:
        manifest = read_manifest(target)
        if step == resumed_from:
            return True
        # A damaged one is no reason to refuse: this run may have fallen back to an earlier one because of it.
        verify_checksums_of(target, manifest)
        existing = (target / STATE_FILE).read_text(encoding="utf-8")
    except (InputError, OSError):
        return False
    if existing == state_text:
        return True
    raise FileExistsError(
        f"{target} already holds a complete checkpoint of another history; resume from it, move it away, "
        "or use a new run directory"
    )


def _publish(temporary: Path, target: Path, step: int, state_text: str, shards: list[ShardRecord]) -> None:
    """Write state and manifest, check what all ranks wrote, and rename the directory into place."""
    state_record = write_durably(temporary / STATE_FILE, state_text)
    manifest = Manifest(step=step, state=state_record, shards=tuple(shards))
    check_manifest(manifest)
    write_durably(temporary / MANIFEST_FILE, manifest_to_json(manifest))
    try:
        read_manifest(temporary)
    except InputError as error:
        raise OSError(f"{error} (is {temporary.parent} on a filesystem that all nodes share?)") from error
    fsync_directory(temporary)
    if os.path.lexists(target):
        _move_broken_aside(target)
    os.rename(temporary, target)
    fsync_directory(target.parent)


def _move_broken_aside(target: Path) -> None:
    """Make way for a complete checkpoint where an incomplete or damaged one lies; nothing is deleted."""
    index = 0
    while os.path.lexists(aside := target.with_name(f"broken-{target.name}-{index}")):
        index += 1
    os.rename(target, aside)
    logger.warning("%s was incomplete or damaged: it was moved to %s", target, aside)


def _state_to_json(state: dict[str, Any]) -> str:
    """The text of ``state.json``, with sorted keys so that equal states give equal bytes."""
    _check_keys(state, "state")
    try:
        return json.dumps(state, sort_keys=True, indent=1) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"the state is not JSON: {error}") from error


def _check_keys(value: Any, where: str) -> None:
    """Refuse keys that JSON would silently turn into strings, so that what is read is what was saved."""
    if isinstance(value, dict):
        for key, entry in value.items():
            if not isinstance(key, str):
                raise ValueError(f"the state is not JSON: {where} has the key {key!r}, expected a string")
            _check_keys(entry, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            _check_keys(entry, f"{where}[{index}]")


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _describe_failure(failure: Exception) -> str:
    return f"{type(failure).__name__}: {failure}" if not isinstance(failure, ValueError) else str(failure)


def _exchange(
    mine: tuple[str | None, Any], step: int, temporary: Path, group: dist.ProcessGroup | None
) -> list[tuple[str | None, Any]]:
    """Gather (error, value) of all ranks; if any rank has an error, clean up and raise the same on all."""
    gathered: list[Any] = [mine]
    if _distributed():
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, mine, group=group)
    failures = [f"rank {rank}: {error}" for rank, (error, _) in enumerate(gathered) if error]
    if not failures:
        return gathered
    if not _distributed() or dist.get_rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
    shown = "; ".join(failures[:4]) + (f"; and {len(failures) - 4} more ranks" if len(failures) > 4 else "")
    if _distributed():
        dist.barrier(group)  # no rank goes on (and perhaps saves again) before the clean-up is done
    raise CheckpointError(
        f"step {step} could not be saved in {temporary.parent}: {shown}. Earlier checkpoints are untouched"
    )
