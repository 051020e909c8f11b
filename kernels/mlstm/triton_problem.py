"""Sizes of one call of the chunkwise mLSTM and the fixed table of kernel configurations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from kernels.launch import interpreter_is_active

MAXIMUM_TILE = 64
MAXIMUM_CHUNK = 512


@dataclass(frozen=True)
class Configuration:
    """Block sizes over the head's columns and launch options of one kernel."""

    block_key: int
    block_value: int
    num_warps: int
    num_stages: int


# Fixed rather than tuned at run time: results then never depend on what ran before, no rank waits for another
# one's tuning, and everything that can run can be compiled ahead of time. Keyed on whether matrix products
# run on bf16 tiles and on whether the head is large; never on the sequence length.
CONFIGURATIONS: dict[tuple[str, str], Configuration] = {
    ("bf16", "state"): Configuration(64, 128, 4, 2),
    ("bf16", "output"): Configuration(64, 128, 4, 3),
    ("bf16", "state_gradient"): Configuration(64, 128, 8, 2),
    ("bf16", "query_gradient"): Configuration(256, 64, 8, 3),
    ("bf16", "key_gradient"): Configuration(256, 64, 8, 3),
    ("bf16", "value_gradient"): Configuration(64, 128, 4, 2),
    ("fp32", "state"): Configuration(32, 64, 4, 1),
    ("fp32", "output"): Configuration(32, 64, 4, 1),
    ("fp32", "state_gradient"): Configuration(32, 64, 4, 1),
    ("fp32", "query_gradient"): Configuration(64, 32, 4, 1),
    ("fp32", "key_gradient"): Configuration(64, 32, 4, 1),
    ("fp32", "value_gradient"): Configuration(32, 64, 4, 1),
}
FP32_MAXIMUM_TILE = 32


@dataclass(frozen=True)
class Problem:
    """Sizes of one call, and the compile-time constants that follow from them."""

    batch: int
    sequence: int
    heads: int
    query_key_size: int
    value_size: int
    chunk: int
    epsilon: float
    has_documents: bool
    input_dtype: torch.dtype

    @classmethod
    def of(cls, query: torch.Tensor, value: torch.Tensor, chunk: int, epsilon: float, has_documents: bool) -> Problem:
        """The problem that a (batch, sequence, heads, size) query and value pose."""
        batch, sequence, heads, query_key_size = query.shape
        return cls(batch, sequence, heads, query_key_size, value.shape[3], chunk, epsilon, has_documents, query.dtype)

    @property
    def rows(self) -> int:
        return self.batch * self.heads

    @property
    def num_chunks(self) -> int:
        return triton.cdiv(self.sequence, self.chunk)

    @property
    def uses_bf16_tiles(self) -> bool:
        # The interpreter stores bf16 as integers and computes nonsense with it; fp16 tiles could overflow,
        # since gates and denominators reach beyond their range.
        return self.input_dtype == torch.bfloat16 and not interpreter_is_active()

    @property
    def tile(self) -> int:
        return min(self.chunk, MAXIMUM_TILE if self.uses_bf16_tiles else FP32_MAXIMUM_TILE)

    @property
    def num_tiles(self) -> int:
        return triton.cdiv(self.sequence, self.tile)

    @property
    def scale(self) -> float:
        return self.query_key_size**-0.5

    def configuration(self, kernel: str) -> Configuration:
        """The configuration of a kernel, with blocks no wider than the head needs (but at least 16)."""
        entry = CONFIGURATIONS["bf16" if self.uses_bf16_tiles else "fp32", kernel]
        return replace(
            entry,
            block_key=min(entry.block_key, max(16, triton.next_power_of_2(self.query_key_size))),
            block_value=min(entry.block_value, max(16, triton.next_power_of_2(self.value_size))),
        )

    def matrix_constants(self, entry: Configuration) -> dict[str, Any]:
        return {
            "QUERY_KEY_SIZE": self.query_key_size,
            "VALUE_SIZE": self.value_size,
            "CHUNK": self.chunk,
            "TILE": self.tile,
            "BLOCK_KEY": entry.block_key,
            "BLOCK_VALUE": entry.block_value,
            "EVEN_KEY": self.query_key_size % entry.block_key == 0,
            "EVEN_VALUE": self.value_size % entry.block_value == 0,
            "HAS_DOCUMENTS": self.has_documents,
            "DOT_DTYPE": tl.bfloat16 if self.uses_bf16_tiles else tl.float32,
            # fp16 inputs are exact in tf32; fp32 inputs ask for full precision.
            "PRECISION": "tf32" if self.input_dtype in (torch.float16, torch.bfloat16) else "ieee",
        }

    def scan_constants(self) -> dict[str, Any]:
        tile = min(self.chunk, MAXIMUM_TILE)
        return {"CHUNK": self.chunk, "TILE": tile, "HAS_DOCUMENTS": self.has_documents}
