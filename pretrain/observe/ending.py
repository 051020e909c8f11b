"""How a process ended, said to the job that started it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from data.errors import DataError
from pretrain.errors import DivergedError, InputError
from pretrain.observe.metrics import replace_file

# Names the file; the job's script sets it.
ENDING_VARIABLE = "PRETRAIN_ENDING"


def job_is_told() -> bool:
    """Whether a job asks for a run's ending by file, and needs no exit code to know it."""
    return bool(os.environ.get(ENDING_VARIABLE))


def say_ending(how: str, message: str) -> None:
    """Writes how this run ended where the job that started it looks; nothing where no job asks, or on other ranks.

    Args:
        how: ``done``, ``stopped`` (by a signal, the state saved), ``bad input``, ``diverged``, ``failed`` or
            ``unhealthy``.
        message: one sentence.
    """
    if job_is_told() and os.environ.get("RANK", "0") == "0":
        replace_file(Path(os.environ[ENDING_VARIABLE]), json.dumps({"how": how, "message": message}).encode())


@contextlib.contextmanager
def errors_said() -> Iterator[None]:
    """Says of an error that leaves it that it ended the run."""
    try:
        yield
    except (InputError, DataError) as error:
        say_ending("bad input", str(error))
        raise
    except DivergedError as error:
        say_ending("diverged", str(error))
        raise
    except Exception as error:
        say_ending("failed", f"{type(error).__name__}: {error}")
        raise
