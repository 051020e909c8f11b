"""What a mixer's ``hf.py`` is written in. Imports no torch.

* ``KEYS``: ``model_type`` of each native ``transformers`` class that has this layer -> our parameter names within
  the mixer -> where each goes within a block of that class: a name, or a :class:`Piece` of a tensor there. A
  parameter that only some configurations have is named too. Where the places depend on the configuration: a function
  of it that gives all this.
* ``OUTPUTS``: patterns (:mod:`fnmatch`) of the parameters within the mixer that its output is proportional to, all of
  them together; only of mixers that a class has whose blocks scale what they add.
* ``FIELDS``: the same classes -> a function of ``(config, hidden_size)`` that gives the class's configuration fields,
  or raises :class:`pretrain.errors.InputError` where the class has no such layer.
* ``SECTIONS``: the same classes -> the way back: a function of the class's configuration fields that gives this mixer's
  section of our configuration, or raises :class:`pretrain.errors.InputError` where the fields are no such layer's. What
  it leaves out or rounds is found, because ``FIELDS`` of the section are compared with the fields.
* ``LAYER_TYPES``: for classes that list the type of each layer, what this one is called there.
* ``settings(config, hidden_size)``: keyword arguments for the class in the mixer's ``modeling.py``, as JSON holds
  them; only where there is a ``modeling.py``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from pretrain.errors import InputError

# ``time_step_limit`` of the classes that have Mamba-2: no limit. Their own default holds an infinity, which JSON lacks.
ANY_TIME_STEP = [0.0, 1e30]

Section = Callable[[Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Piece:
    """One of our parameters as a piece of a tensor of a native class.

    Attributes:
        name: of the tensor.
        order: place among its pieces, which follow each other along dimension 0.
        unsqueeze: a dimension of length 1 that the tensor has and our parameter lacks.
        stack: the tensor's pieces, one after the other, are so many groups of equal length, which follow each other
            along a dimension in front; None: there is no such dimension.
        scale: by which our parameter is multiplied there.
    """

    name: str
    order: int = 0
    unsqueeze: int | None = None
    stack: int | None = None
    scale: float = 1.0


def places_within(form: ModuleType, model_type: str, config: Any) -> Mapping[str, str | Piece]:
    """Entry of a mixer's ``KEYS``.

    Args:
        form: its ``hf.py``.
        model_type: of a class that has the mixer.
        config: of the mixer.
    """
    places = form.KEYS[model_type]
    return places(config) if callable(places) else places


def pieces_of_tensors(places: Mapping[str, str | Piece], parameters: Iterable[str]) -> dict[str, dict[str, Piece]]:
    """Which parameters make up each tensor of a native class.

    Args:
        places: our names -> a name there, or a piece of a tensor there.
        parameters: names of the parameters that there are.

    Returns:
        Tensor -> its parameters and their pieces, in order.

    Raises:
        ValueError: a parameter has no place, or two have the same.
    """
    tensors: defaultdict[str, dict[str, Piece]] = defaultdict(dict)
    for parameter in parameters:
        if parameter not in places:
            raise ValueError(f"the parameter {parameter!r} has no name there")
        place = places[parameter]
        piece = Piece(place) if isinstance(place, str) else place
        tensors[piece.name][parameter] = piece
    for tensor, pieces in tensors.items():
        if len({piece.order for piece in pieces.values()}) < len(pieces):
            raise ValueError(f"the parameters {', '.join(pieces)} have one place in {tensor!r}")
    return {tensor: dict(sorted(pieces.items(), key=lambda item: item[1].order)) for tensor, pieces in tensors.items()}


def shape_of_pieces(pieces: Mapping[str, Piece], shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Shape of the tensor of a native class that these parameters make up; ``shapes`` are the parameters'."""
    (first, piece), *_ = pieces.items()
    shape = list(shapes[first])
    if piece.unsqueeze is not None:
        shape.insert(piece.unsqueeze, 1)
    rows = sum(shapes[name][0] for name in pieces)
    return (rows, *shape[1:]) if piece.stack is None else (piece.stack, rows // piece.stack, *shape[1:])


def renamed_section(kind: str, names: Mapping[str, str], **fixed: Any) -> Section:
    """An entry of ``SECTIONS`` that takes fields as they are.

    Args:
        kind: the section's ``type``.
        names: our keys -> the class's fields.
        fixed: further keys of the section.
    """

    def section(fields: Mapping[str, Any]) -> dict[str, Any]:
        missing = [theirs for theirs in names.values() if theirs not in fields]
        if missing:
            raise InputError(f"{', '.join(missing)} can be told neither from the file nor from its other fields")
        return {"type": kind, **{ours: fields[theirs] for ours, theirs in names.items()}, **fixed}

    return section
