"""The one error that the data package raises for what a user can mend."""

from __future__ import annotations


class DataError(Exception):
    """A source, tokenizer or prepared file is missing, empty, unreadable or does not fit.

    The message is one clear sentence that names the file or key, what was expected and how to mend it.
    """
