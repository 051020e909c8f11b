"""A directory that appears whole or not at all."""

from __future__ import annotations

import contextlib
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


@contextlib.contextmanager
def whole_directory(output: Path) -> Iterator[Path]:
    """A directory beside ``output`` to write in, renamed to it at the end; removed where anything was raised.

    Raises:
        InputError: the place cannot be written to.
    """
    unfinished = output.with_name(f".{output.name}.unfinished-{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        unfinished.mkdir()
    except OSError as error:
        raise InputError(f"{output} cannot be written: {error.strerror or error}; give another place") from None
    try:
        yield unfinished
        if output.exists():
            output.rmdir()
        os.rename(unfinished, output)
        fsync_directory(output.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
