"""Which documents are held out."""

from __future__ import annotations

import hashlib


def held_out(identity: str, fraction: float) -> bool:
    """Whether the document of this identity is held out: by a hash of the identity, never by position.

    A document therefore stays on its side when others are added, removed or reordered, and a larger fraction
    only ever moves documents from training to held out.
    """
    return identity_position(identity) < fraction


def identity_position(identity: str) -> float:
    """A number in [0, 1) from the SHA-256 of ``identity``."""
    digest = hashlib.sha256(identity.encode("utf-8", errors="surrogateescape")).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53
