"""Numbers as people read them."""

from __future__ import annotations


def format_bytes(count: float) -> str:
    """Bytes in the binary unit that keeps the number short, for instance ``27.50 GiB``."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:,.2f} GiB"


def format_count(count: float) -> str:
    """A count with a decimal prefix, for instance ``41.3 G``."""
    for prefix in ("", "K", "M", "G", "T", "P", "E"):
        if abs(count) < 1000:
            return f"{count:.4g} {prefix}".rstrip()
        count /= 1000
    return f"{count:.4g} Z"
