"""YAML from people and from strangers: plain values of bounded size, or one sentence. Imports no torch."""

from __future__ import annotations

from typing import Any

import yaml

# Far more than any run needs. Aliases let a few lines of YAML stand for billions of nodes.
MOST_NODES = 50_000
DEEPEST = 50
# References to other keys may refer to references in turn, and so multiply; those to the environment cannot.
MOST_REFERENCES = 16


def read_yaml(text: str) -> Any:
    """What a YAML text holds; nothing in it is executed.

    Raises:
        ValueError: in one line, whatever is wrong with it.
    """
    try:
        content = yaml.safe_load(text)
    except RecursionError:
        raise ValueError(f"it is nested more than {DEEPEST} deep") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        # The library looks at values of a type (a date, a number with underscores, !!bool x) no further than at their
        # first letters.
        raise ValueError(f"a value is not of the type that it seems to be of ({error})") from None
    _check(content)
    return content


def _check(content: Any) -> None:
    nodes = references = 0
    open_nodes = [(content, "", 0)]
    while open_nodes:
        value, key, depth = open_nodes.pop()
        nodes += 1
        if nodes > MOST_NODES:
            raise ValueError(f"it has more than {MOST_NODES:,} values, counting each alias as what it stands for")
        if depth > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} deep")
        if isinstance(value, dict):
            for inner, item in value.items():
                if not isinstance(inner, str):
                    raise ValueError(f"the key {_at(key, inner)} is not text; put it in quotes")
                open_nodes.append((item, _at(key, inner), depth + 1))
        elif isinstance(value, list):
            open_nodes += [(item, key, depth + 1) for item in value]
        elif isinstance(value, str):
            references += value.count("${") - value.count("${oc.env:")
            if references > MOST_REFERENCES:
                raise ValueError(f"it has more than {MOST_REFERENCES} references ${{...}} to other keys")
        elif not isinstance(value, int | float | type(None)):
            raise ValueError(f"'{key}' is a {type(value).__name__} in YAML's reading; put it in quotes")


def _at(key: str, inner: object) -> str:
    return f"{key}.{inner}" if key else str(inner)
