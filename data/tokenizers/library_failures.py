"""Failures of the libraries that tokenize, as the one error that this package raises."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from data.errors import DataError


@contextlib.contextmanager
def told(message: Callable[[str], str]) -> Iterator[None]:
    """Raises ``DataError`` with ``message(reason)`` for whatever a library raises within.

    They raise bare ``Exception``, types of their own that change from version to version, and, where Rust code panics
    over a damaged file, what is no ``Exception`` at all.
    """
    try:
        yield
    except (DataError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise DataError(message(" ".join(str(error).split()) or type(error).__name__)) from error


@contextlib.contextmanager
def told_of_text() -> Iterator[None]:
    """The same for texts that are encoded."""
    with told(
        lambda reason: (
            f"the tokenizer cannot encode every text ({reason}); give it a token for what its vocabulary lacks, or use"
            " another tokenizer."
        )
    ):
        yield
