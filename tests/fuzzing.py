"""What tests of damaged and hostile files share: values of any kind, and a file's content with some of them in it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import strategies as st

# Numbers at which sizes overflow, and whatever else JSON can hold.
_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 60)
    | st.integers()
    | st.sampled_from([2**31, 2**53, 2**63, 2**64, 10**30, 10**400])
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["\ud800", "..", "a|b", ""])
)
JSON_VALUES: st.SearchStrategy[Any] = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def fast_and_slow(few: int, many: int) -> Callable[[Callable], Callable]:
    """A test with an argument ``examples``: few in every run, and many in the slow ones."""
    return pytest.mark.parametrize("examples", [few, pytest.param(many, marks=pytest.mark.slow)])


def places(content: Any, above: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The path of every value in nested mappings and lists."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inner:
        yield (*above, key)
        yield from places(value, (*above, key))


def changed(content: Any, values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """The content with one to three of its values replaced, left out, or under another name."""
    how = st.sampled_from(["replaced", "left out", "renamed"])
    changes = st.lists(st.tuples(st.sampled_from(list(places(content))), how, values), min_size=1, max_size=3)
    return changes.map(lambda drawn: _apply(content, drawn))


def _apply(content: Any, changes: list[tuple[tuple[str | int, ...], str, Any]]) -> Any:
    result = copy.deepcopy(content)
    for (*above, last), how, value in changes:
        holder = result
        for key in above:
            known = isinstance(holder, dict) and key in holder
            known = known or (isinstance(holder, list) and isinstance(key, int) and key < len(holder))
            holder = holder[key] if known else None
        known = isinstance(holder, dict) and last in holder
        if not known and not (isinstance(holder, list) and isinstance(last, int) and last < len(holder)):
            # An earlier change took this place away.
            continue
        if how == "left out":
            del holder[last]
        elif how == "renamed" and isinstance(holder, dict):
            holder[str(value)] = holder.pop(last)
        else:
            holder[last] = value
    return result
