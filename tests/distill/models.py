"""Tiny teachers of attention alone, and runs that learn from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pretrain.distill.replacing import replace_layers
from pretrain.models.decoder import Decoder
from tests.convert.checkpoints import write_run

ATTENTION = {"type": "attention", "num_heads": 4, "num_key_value_heads": 2}
SWIGLU = {"type": "swiglu", "round_up_to": 16}


def attention_model(num_layers: int = 3, **keys: Any) -> dict[str, Any]:
    """A model section; ``keys`` are of the attention."""
    block = {"mixer": ATTENTION | keys, "channel": SWIGLU}
    return {
        "vocab_size": 264,
        "hidden_size": 32,
        "num_layers": num_layers,
        "layers": ["attention"],
        "blocks": {"attention": block, "mlstm": block},
        "output_logit_soft_cap": None,
    }


def write_teacher(directory: Path, **keys: Any) -> tuple[Path, Decoder]:
    """A run directory with a teacher of random weights, and the teacher."""
    return write_run(directory, attention_model(**keys))


def write_student(directory: Path, mixer: str = "mamba2", **keys: Any) -> tuple[Path, Path]:
    """Directories of a teacher and of a student in which the middle layer was replaced."""
    teacher, _ = write_teacher(directory / "teacher", **keys)
    replace_layers(teacher, directory / "student", [1], mixer)
    return teacher, directory / "student"
