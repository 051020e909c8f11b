"""A directory that appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from pretrain.checkpoint.directory import fsync_directory
from pretrain.errors import InputError


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

    What it then holds is on the disk.

    Raises:
        InputError: the place cannot be written to, or has no room left.
    """
    unfinished = output.with_name(f".{output.name}.unfinished-{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        unfinished.mkdir()
    except OSError as error:
        raise _unwritable(output, error) from None
    try:
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
