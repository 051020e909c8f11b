"""What pictures have in common: colours, axes, and how they are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pretrain.errors import InputError

SUFFIXES = (".png", ".pdf", ".svg")
# Okabe and Ito's palette, told apart by the colour-blind too (the yellow left out: too faint on white).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")


def check_suffix(output: Path) -> None:
    """Raises ``InputError`` unless the name of a picture says one of the kinds that are drawn."""
    if output.suffix.lower() not in SUFFIXES:
        raise InputError(f"{output}: the picture's name must end in one of {', '.join(SUFFIXES)}")


def style(panel: Any, title: str, label: str) -> None:
    """Title, label of the vertical axis, and a faint grid."""
    panel.set_title(title, loc="left", fontsize=11)
    panel.set_ylabel(label)
    panel.grid(True, which="major", color="#dddddd", linewidth=0.7)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def save(figure: Any, output: str | Path) -> Path:
    """Writes a picture; its directory is made where it is missing.

    Raises:
        InputError: for a suffix that is not known, or a picture that cannot be written.
    """
    output = Path(output)
    check_suffix(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=130)
    except OSError as error:
        raise InputError(f"{output} cannot be written: {error.strerror or error}") from None
    return output
