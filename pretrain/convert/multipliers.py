"""Constants that a class multiplies activations by and our layers do not: an import multiplies them into weights."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from pretrain.config.model import ModelConfig
from pretrain.errors import InputError
from pretrain.models.registry import family_of


@dataclass(frozen=True)
class Multipliers:
    """What a class multiplies by; the model is the same with them in its weights, which then are trained as they are.

    Attributes:
        embedding: of the embedded tokens, not of a head that is tied to the embedding.
        residual: of what each mixer adds to the residual stream.
        logits: of the logits.
    """

    embedding: float = 1.0
    residual: float = 1.0
    logits: float = 1.0

    @classmethod
    def none(cls, fields: Mapping[str, Any]) -> Multipliers:
        """Of a class that has no such constants."""
        return cls()

    def factors(self, model: ModelConfig, parameters: Collection[str]) -> dict[str, float]:
        """By what each parameter is to be multiplied; those that stay are left out.

        Logits are proportional to the last norm's weight, which thus takes what is theirs, and takes back what a tied
        head has too much.
        """
        ends = {
            "embedding.weight": self.embedding,
            "output_norm.weight": self.logits / (self.embedding if model.tie_embeddings else 1.0),
        }
        factors = {name: ends[name] for name in parameters if name in ends}
        if self.residual != 1:
            factors |= {name: self.residual for name in parameters if _adds(model, name)}
        return {name: factor for name, factor in factors.items() if factor != 1}


def _adds(model: ModelConfig, name: str) -> bool:
    """Whether a layer's output to the residual stream is proportional to this parameter."""
    stack, *path = name.split(".", 3)
    if stack != "layers" or len(path) < 3:
        return False
    layer, part, inner = path
    config = getattr(model.block(int(layer)), part, None)
    return config is not None and any(fnmatchcase(inner, pattern) for pattern in family_of(config).hugging_face.OUTPUTS)


def positive(fields: Mapping[str, Any], name: str) -> float:
    """A field that weights can be multiplied by, and divided.

    Raises:
        InputError: it is no finite number above 0.
    """
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InputError(f"{name} is {value!r}, where a number above 0 is expected")
    return float(value)
