"""Recall, counting and state tracking, from generators of our own: every task by its name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from pretrain.errors import InputError
from pretrain.evaluate.recall import associative, automata, brackets, copying, counting, passkey
from pretrain.evaluate.recall.base import RecallTask

_FAMILIES = (associative, passkey, automata, counting, brackets, copying)


def recall_tasks() -> dict[str, RecallTask]:
    """Every task by its name; a family is a module with ``TASKS``."""
    return {task.name: task for family in _FAMILIES for task in family.TASKS}


def tasks_by_name(names: Sequence[str]) -> list[RecallTask]:
    """The tasks of these names, each once; all of them where none is named.

    Raises:
        InputError: there is no task of a name.
    """
    known = recall_tasks()
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"there is no recall task {name!r}: expected some of {', '.join(known)}{meant}")
    return [known[name] for name in dict.fromkeys(names or known)]
