"""Sizes of one call of the chunkwise state-space recurrence and the fixed table of kernel configurations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from kernels.launch import interpreter_is_active

MINIMUM_CHUNK, MAXIMUM_CHUNK = 16, 512
MAXIMUM_TILE = 64
FP32_MAXIMUM_TILE = 32

# Programs that add up over the heads of a group take at most so many, so that models of one group and many heads
# still make enough of them; what each finds is added up afterwards.
HEADS_PER_PROGRAM = 16


@dataclass(frozen=True)
class Configuration:
    """Block sizes over channels and state, and launch options, of one kernel."""

    block_value: int
    block_state: int
    num_warps: int
    num_stages: int


# Fixed rather than tuned at run time: results then never depend on what ran before, no rank waits for another one's
# tuning, and everything that can run can be compiled ahead of time. Never keyed on the sequence length.
CONFIGURATIONS: dict[tuple[str, str], Configuration] = {
    ("bf16", "score"): Configuration(64, 64, 4, 2),
    ("bf16", "state"): Configuration(64, 64, 4, 2),
    ("bf16", "output"): Configuration(64, 64, 4, 2),
    ("bf16", "state_gradient"): Configuration(64, 64, 8, 2),
    ("bf16", "value_gradient"): Configuration(64, 64, 8, 2),
    ("bf16", "score_gradient"): Configuration(64, 64, 4, 2),
    ("bf16", "query_gradient"): Configuration(64, 128, 8, 2),
    ("bf16", "key_gradient"): Configuration(64, 128, 8, 2),
    ("fp32", "score"): Configuration(32, 32, 4, 1),
    ("fp32", "state"): Configuration(32, 64, 4, 1),
    ("fp32", "output"): Configuration(64, 32, 4, 1),
    ("fp32", "state_gradient"): Configuration(32, 64, 4, 1),
    ("fp32", "value_gradient"): Configuration(64, 32, 4, 1),
    ("fp32", "score_gradient"): Configuration(32, 32, 4, 1),
    ("fp32", "query_gradient"): Configuration(32, 64, 4, 1),
    ("fp32", "key_gradient"): Configuration(32, 64, 4, 1),
}


@dataclass(frozen=True)
class Problem:
    """Sizes of one call, and the compile-time constants that follow from them."""

    batch: int
    sequence: int
    heads: int
    head_size: int
    groups: int
    state_size: int
    chunk: int
    has_documents: bool
    has_skip: bool
    input_dtype: torch.dtype

    @classmethod
    def of(cls, values: torch.Tensor, keys: torch.Tensor, chunk: int, has_documents: bool, has_skip: bool) -> Problem:
        """The problem that (batch, sequence, heads, size) values and (batch, sequence, groups, state) keys pose."""
        batch, sequence, heads, head_size = values.shape
        groups, state_size = keys.shape[2:]
        return cls(batch, sequence, heads, head_size, groups, state_size, chunk, has_documents, has_skip, values.dtype)

    @property
    def rows(self) -> int:
        return self.batch * self.heads

    @property
    def num_chunks(self) -> int:
        return triton.cdiv(self.sequence, self.chunk)

    @property
    def uses_bf16_tiles(self) -> bool:
        # The interpreter stores bf16 as integers and computes nonsense with it; fp16 tiles could overflow.
        return self.input_dtype == torch.bfloat16 and not interpreter_is_active()

    @property
    def tile_dtype(self) -> torch.dtype:
        """Of scores and of their gradients between kernels: what the next matrix product reads."""
        return torch.bfloat16 if self.uses_bf16_tiles else torch.float32

    @property
    def tile(self) -> int:
        return min(self.chunk, MAXIMUM_TILE if self.uses_bf16_tiles else FP32_MAXIMUM_TILE)

    @property
    def num_tiles(self) -> int:
        return triton.cdiv(self.sequence, self.tile)

    @property
    def tiles_per_chunk(self) -> int:
        return self.chunk // self.tile

    @property
    def heads_per_slice(self) -> int:
        """Heads of one group that one program adds up over: the most that the limit and whole slices allow."""
        of_group = self.heads // self.groups
        return max(size for size in range(1, min(of_group, HEADS_PER_PROGRAM) + 1) if of_group % size == 0)

    @property
    def slices(self) -> int:
        """Of all groups together."""
        return self.heads // self.heads_per_slice

    def configuration(self, kernel: str) -> Configuration:
        """The configuration of a kernel, with blocks no wider than the sizes need (but at least 16)."""
        entry = CONFIGURATIONS["bf16" if self.uses_bf16_tiles else "fp32", kernel]
        return replace(
            entry,
            block_value=min(entry.block_value, max(16, triton.next_power_of_2(self.head_size))),
            block_state=min(entry.block_state, max(16, triton.next_power_of_2(self.state_size))),
        )

    def value_blocks(self, entry: Configuration) -> int:
        return triton.cdiv(self.head_size, entry.block_value)

    def state_blocks(self, entry: Configuration) -> int:
        return triton.cdiv(self.state_size, entry.block_state)

    def constants(self, entry: Configuration) -> dict[str, Any]:
        """Those of every kernel that multiplies matrices."""
        return {
            "HEAD_SIZE": self.head_size,
            "STATE_SIZE": self.state_size,
            "CHUNK": self.chunk,
            "TILE": self.tile,
            "BLOCK_VALUE": entry.block_value,
            "BLOCK_STATE": entry.block_state,
            "EVEN_VALUE": self.head_size % entry.block_value == 0,
            "EVEN_STATE": self.state_size % entry.block_state == 0,
            "HAS_DOCUMENTS": self.has_documents,
            "DOT_DTYPE": tl.bfloat16 if self.uses_bf16_tiles else tl.float32,
            # fp16 inputs are exact in tf32; fp32 inputs ask for full precision.
            "PRECISION": "tf32" if self.input_dtype in (torch.float16, torch.bfloat16) else "ieee",
        }
