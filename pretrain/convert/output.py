"""A directory that appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import platform
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from pretrain.checkpoint.directory import fsync_directory
from pretrain.errors import InputError

logger = logging.getLogger(__name__)


def check_output(output: Path, purpose: str) -> None:
    """Raises ``InputError`` unless ``output`` is a name that is free, or an empty directory.

    ``purpose`` ends the message: to ``export into``, say.
    """
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise InputError(f"{output} is not a directory; give the name of a new one to {purpose}")
    if output.is_dir() and any(output.iterdir()):
        raise InputError(f"{output} is not empty; give the name of a new directory to {purpose}")


# What writing fails with, and reading does not.
_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


@contextlib.contextmanager
def whole_directory(output: Path) -> Iterator[Path]:
    """A directory beside ``output`` to write in, renamed to it at the end; removed where anything was raised.

    What it then holds is on the disk. What a process of this host that was killed left there is removed too: a
    directory is locked while it is written in, and the lock ends with its process.

    Raises:
        InputError: the place cannot be written to, or has no room left.
    """
    unfinished = output.with_name(f"{_beginning_of_names(output)}{_host()}-{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_what_the_dead_left(output)
        unfinished.mkdir()
        lock = os.open(unfinished, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise _unwritable(output, error) from None
    try:
        _is_locked_now(lock)
        yield unfinished
        _make_durable(unfinished)
        if output.exists():
            output.rmdir()
        os.rename(unfinished, output)
        fsync_directory(output.parent)
    except OSError as error:
        # Others, of files that cannot be read, are not this directory's.
        if error.errno not in _UNWRITABLE:
            raise
        raise _unwritable(output, error) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        os.close(lock)


def _beginning_of_names(output: Path) -> str:
    """Of the directories beside ``output`` that are written in; the host and the number of the process follow."""
    return f".{output.name}.unfinished-"


def _host() -> str:
    return platform.node().replace(os.sep, "_") or "unknown"


def _remove_what_the_dead_left(output: Path) -> None:
    """Removes the unfinished directories of processes that ended on this host, and says so, a line for each.

    Of another host's nothing is known: not every file system shares its locks.
    """
    names = re.compile(rf"{re.escape(_beginning_of_names(output))}(?P<host>.+)-(?P<process>[0-9]+)")
    for entry in sorted(output.parent.iterdir()):
        match = names.fullmatch(entry.name)
        if match is None or entry.is_symlink() or not entry.is_dir():
            continue
        if match["host"] != _host():
            logger.warning("%s is left alone: it may be written in on %s; else delete it", entry, match["host"])
            continue
        descriptor = os.open(entry, os.O_RDONLY | os.O_DIRECTORY)
        try:
            locked = _is_locked_now(descriptor)
            if locked or (locked is None and not _is_alive(int(match["process"]))):
                shutil.rmtree(entry)
                logger.warning("removed %s, left by a process that did not finish", entry)
        finally:
            os.close(descriptor)


def _is_locked_now(descriptor: int) -> bool | None:
    """Locks a directory; False where another process has it, None where the file system cannot lock directories."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_alive(process: int) -> bool:
    """Whether there is another process of this number on this host."""
    if process == os.getpid():
        # What has this number was left by an earlier process that had it.
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _make_durable(directory: Path) -> None:
    """Forces a directory to disk with all that it holds."""
    for entry in directory.iterdir():
        if entry.is_dir():
            _make_durable(entry)
        else:
            with entry.open("rb") as file:
                os.fsync(file.fileno())
    fsync_directory(directory)


def _unwritable(output: Path, error: OSError) -> InputError:
    return InputError(f"{output} cannot be written: {error.strerror or error}; make room there or give another place")
