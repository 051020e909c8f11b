"""The native classes of ``transformers`` that models are exported to and imported from."""

from __future__ import annotations

from pretrain.convert.bamba import BAMBA
from pretrain.convert.granite_moe_hybrid import GRANITE_MOE_HYBRID
from pretrain.convert.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from pretrain.convert.mamba2 import MAMBA2
from pretrain.convert.native import NativeClass
from pretrain.convert.nemotron_h import NEMOTRON_H
from pretrain.convert.xlstm import XLSTM

# The first that fits is taken.
NATIVE_CLASSES: tuple[NativeClass, ...] = (
    XLSTM,
    MAMBA2,
    NEMOTRON_H,
    BAMBA,
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    GRANITE_MOE_HYBRID,
)
