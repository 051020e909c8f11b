"""ParaLSTM in Hugging Face's form: settings of ``modeling.py``; no class of ``transformers`` has this layer."""

from __future__ import annotations

from pretrain.models.para_gru.hf import settings

__all__ = ["FIELDS", "KEYS", "settings"]

KEYS: dict[str, dict] = {}
FIELDS: dict = {}
