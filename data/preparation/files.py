"""Files that are there whole or not at all, and one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

LOCK_FILE = ".lock"
_TEMPORARY = ".partial-"


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file such that it is there whole or not at all, whatever happens."""
    temporary = temporary_name(path)
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            flush_file(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    flush_directory(path.parent)


def temporary_name(path: Path) -> Path:
    """Where a file is written before it gets its name; different for every call."""
    return path.with_name(f"{path.name}{_TEMPORARY}{secrets.token_hex(8)}")


def temporary_files(directory: Path) -> list[Path]:
    """What is left of files that were never finished."""
    return sorted(directory.glob(f"*{_TEMPORARY}*"))


def flush_file(descriptor: int) -> None:
    """Makes what was written to a file outlast a power failure."""
    os.fsync(descriptor)


def flush_directory(directory: Path) -> None:
    """Makes renames and removals in a directory outlast a power failure."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        flush_file(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def only_process(directory: Path, on_wait: Callable[[], None]) -> Iterator[bool]:
    """Waits until no other process is in here with this directory; False where the file system has no locks.

    A lock ends with its process, however that ends. ``on_wait`` is called where another process has it.
    """
    with open(directory / LOCK_FILE, "a") as lock:
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait()
                fcntl.flock(lock, fcntl.LOCK_EX)
            locked = True
        except OSError:
            # Some network file systems have no locks.
            locked = False
        yield locked
