"""A directory that appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
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

    What it then holds is on the disk. What a process that was killed left there is removed too: a directory is locked
    while it is written in, and the lock ends with its process.

    Raises:
        InputError: the place cannot be written to, or has no room left.
    """
    unfinished = output.with_name(f".{output.name}.unfinished-{os.getpid()}")
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


def _remove_what_the_dead_left(output: Path) -> None:
    own_names = re.compile(rf"\.{re.escape(output.name)}\.unfinished-[0-9]+")
    for entry in output.parent.iterdir():
        if not own_names.fullmatch(entry.name) or entry.is_symlink() or not entry.is_dir():
            continue
        descriptor = os.open(entry, os.O_RDONLY | os.O_DIRECTORY)
        try:
            if _is_locked_now(descriptor):
                shutil.rmtree(entry)
                logger.warning("removed %s, left by a process that did not finish", entry)
        finally:
            os.close(descriptor)


def _is_locked_now(descriptor: int) -> bool:
    """Locks a directory; false where another process has it, or where the file system knows no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
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
