"""The checkpoints of a run: names, listing, the newest complete one, retention. Needs no torch."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pretrain.checkpoint.format import MANIFEST_FILE, Manifest, file_sha256, read_manifest
from pretrain.errors import InputError

logger = logging.getLogger(__name__)

CHECKPOINTS_DIRECTORY = "checkpoints"
_STEP_NAME = re.compile(r"step-([0-9]{8,})")
_TEMPORARY_NAME = re.compile(r"tmp-(removed-)?step-[0-9]{8,}")


def checkpoint_name(step: int) -> str:
    """Directory name of a step: ``step-00000100``."""
    if step < 0:
        raise ValueError(f"step must not be negative, got {step}")
    return f"step-{step:08d}"


def temporary_name(step: int) -> str:
    """Name of the directory in which a checkpoint is written before it is renamed into place."""
    return f"tmp-{checkpoint_name(step)}"


def is_step_directory(path: Path) -> bool:
    """Whether a directory is named like a checkpoint, complete or not."""
    return _STEP_NAME.fullmatch(path.name) is not None


def step_directories(run_checkpoints: Path) -> list[tuple[int, Path]]:
    """(step, path) of every directory named like a checkpoint, complete or not, in order of step."""
    run_checkpoints = Path(run_checkpoints)
    try:
        entries = list(run_checkpoints.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = []
    for entry in entries:
        match = _STEP_NAME.fullmatch(entry.name)
        if match and entry.is_dir():
            found.append((int(match.group(1)), entry))
    return sorted(found)


def read_listed_manifest(step: int, path: Path) -> Manifest:
    """The manifest of a listed checkpoint; ``InputError`` if incomplete or of another step than its name."""
    manifest = read_manifest(path)
    if manifest.step != step:
        raise InputError(f"{path / MANIFEST_FILE} is of step {manifest.step}: the directory was renamed")
    return manifest


def list_checkpoints(run_checkpoints: Path) -> list[Path]:
    """The complete checkpoints (manifest sound, every file there with its size), in order of step."""
    complete = []
    for step, path in step_directories(run_checkpoints):
        try:
            read_listed_manifest(step, path)
        except InputError:
            continue
        complete.append(path)
    return complete


def newest_checkpoint(run_checkpoints: Path, *, verify_checksums: bool = False) -> Path | None:
    """The newest complete checkpoint, or ``None``; each broken one that is skipped is reported in the log.

    Args:
        run_checkpoints: directory that holds all checkpoints of a run.
        verify_checksums: also read every file and compare its SHA-256, so that a flipped bit is skipped too.
    """
    for step, path in reversed(step_directories(run_checkpoints)):
        try:
            manifest = read_listed_manifest(step, path)
            if verify_checksums:
                verify_checksums_of(path, manifest)
        except InputError as error:
            logger.warning("SKIPPING A BROKEN CHECKPOINT %s: %s", path, error)
            continue
        return path
    return None


def verify_checksums_of(path: Path, manifest: Manifest, share: tuple[int, int] = (0, 1)) -> None:
    """Compare the SHA-256 of the checkpoint's files with its manifest.

    Args:
        path: the checkpoint's directory.
        manifest: its manifest.
        share: (index, count): check every count-th file from index on, so that ranks can divide the work.

    Raises:
        InputError: naming every file that differs.
    """
    index, count = share
    records = manifest.files[index::count]
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        problems = list(pool.map(lambda record: _problem_of(path / record.file, record.sha256), records))
    found = [problem for problem in problems if problem]
    if found:
        raise InputError(f"{'; '.join(found)}; use an earlier checkpoint")


def _problem_of(path: Path, expected_sha256: str) -> str | None:
    try:
        actual = file_sha256(path)
    except OSError as error:
        return f"{path} cannot be read: {error}"
    if actual != expected_sha256:
        return f"{path} does not match its SHA-256 in {MANIFEST_FILE} (damaged after it was written)"
    return None


def resolve_checkpoint(path: Path) -> Path:
    """The checkpoint that a person means by a run, its checkpoints directory, or one step directory.

    A run or checkpoints directory means its newest complete checkpoint.

    Raises:
        InputError: when there is no such directory or it holds no complete checkpoint.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path} is not a directory; give a run directory or one of its checkpoints")
    if (path / MANIFEST_FILE).exists() or is_step_directory(path):
        read_manifest(path)
        return path
    for candidate in (path / CHECKPOINTS_DIRECTORY, path):
        if step_directories(candidate):
            newest = newest_checkpoint(candidate)
            if newest is None:
                raise InputError(f"{candidate} holds only incomplete checkpoints; see the log for each")
            return newest
    raise InputError(
        f"{path} holds no checkpoint: expected a run directory with {CHECKPOINTS_DIRECTORY}/, "
        "a directory of step-NNNNNNNN, or one checkpoint"
    )


def prune_checkpoints(run_checkpoints: Path, keep_last: int, keep_every: int | None = None) -> list[Path]:
    """Remove complete checkpoints that are neither among the last ``keep_last`` nor on a ``keep_every`` step.

    Broken directories neither count nor are removed; a failed removal is reported in the log, for it must not
    stop training. Call it on one rank.

    Args:
        run_checkpoints: directory that holds all checkpoints of a run.
        keep_last: how many of the newest complete checkpoints to keep, at least 1.
        keep_every: keep every checkpoint whose step is a multiple of this; ``None`` keeps no others.

    Returns:
        The paths that were removed.
    """
    if keep_last < 1:
        raise InputError(f"keep_last must be at least 1 so that a run can be resumed, got {keep_last}")
    if keep_every is not None and keep_every < 1:
        raise InputError(f"keep_every must be a positive number of steps or null, got {keep_every}")
    removed = []
    for path in list_checkpoints(run_checkpoints)[:-keep_last]:
        step = int(path.name.removeprefix("step-"))
        if keep_every is not None and step % keep_every == 0:
            continue
        # Renamed first: a removal cut short must not leave something that looks like a broken checkpoint.
        doomed = path.with_name(f"tmp-removed-{path.name}")
        try:
            shutil.rmtree(doomed, ignore_errors=True)
            os.rename(path, doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            logger.warning("%s could not be removed: %s", path, error)
            continue
        removed.append(path)
    return removed


def remove_stale_temporaries(run_checkpoints: Path) -> list[Path]:
    """Remove what a killed save or removal left; only one process may write to the directory at a time."""
    stale = [entry for entry in Path(run_checkpoints).iterdir() if _TEMPORARY_NAME.fullmatch(entry.name)]
    for entry in stale:
        shutil.rmtree(entry)
        logger.warning("removed %s, left by a save that did not finish", entry)
    return stale


def fsync_directory(path: Path) -> None:
    """Force a directory's entries to disk; file systems that cannot do this for directories are let pass."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
