"""What ``bench kernels`` times on a CUDA device: the Triton forms in bfloat16, at the shapes of 7B models.

Traffic is counted as the least that any form needs; what a form writes for itself (states at chunk boundaries, say)
lowers its share of the bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.mlstm import mlstm
from kernels.slstm import slstm
from kernels.ssd import ssd
from pretrain.bench import cells_peers as peers
from pretrain.bench.cells import (
    NEWTON_CELLS,
    Bounds,
    Draw,
    Entry,
    NewtonCell,
    Problem,
    Suite,
    forward_and_backward,
    mlstm_bytes,
    mlstm_flops,
    mlstm_inputs,
    slstm_bytes,
    slstm_flops,
    slstm_inputs,
)
from pretrain.bench.contestants import Contestant


@dataclass(frozen=True)
class Sizes:
    """Sizes of all problems, and where they are solved.

    Attributes:
        batch, tokens, width: of all but the sLSTM's tokens; width is the channels of the nonlinear cells.
        mlstm: heads, channels of a query and of a value, as in xLSTM-7B.
        mlstm_chunks: tokens per chunk that ours is timed with.
        ssd: heads, channels of a head, state, groups.
        ssd_chunks: tokens per chunk that ours is timed with.
        newton_tokens: lengths that ParaGRU and ParaLSTM are timed at.
        slstm: heads, tokens.
        square: rows of the square matrices whose product bounds matrix products.
        copied: bytes copied in the copy whose rate bounds the rest.
        backend: of our kernels.
    """

    batch: int = 8
    tokens: int = 8192
    width: int = 4096
    mlstm: tuple[int, int, int] = (8, 256, 512)
    mlstm_chunks: tuple[int, ...] = (64, 128, 256)
    ssd: tuple[int, int, int, int] = (128, 64, 128, 8)
    ssd_chunks: tuple[int, ...] = (128, 256)
    newton_tokens: tuple[int, ...] = (2048, 8192)
    slstm: tuple[int, int] = (8, 2048)
    square: int = 8192
    copied: int = 1 << 30
    backend: str = "triton"
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16

    @property
    def options(self) -> dict[str, Any]:
        return {"device": self.device, "dtype": self.dtype}


STANDARD = Sizes()


def bounds(sizes: Sizes = STANDARD) -> Bounds:
    """A product and a copy."""
    left, right, product = (torch.randn(sizes.square, sizes.square, **sizes.options) for _ in range(3))
    source, target = (torch.empty(sizes.copied, device=sizes.device, dtype=torch.uint8) for _ in range(2))
    return Bounds(
        Contestant("product", lambda: torch.mm(left, right, out=product), lambda: None, 0),
        2.0 * sizes.square**3,
        Contestant("copy", lambda: target.copy_(source), lambda: None, 0),
        2.0 * sizes.copied,
    )


def _mlstm(sizes: Sizes) -> Problem:
    heads, query_key, value = sizes.mlstm
    shape = (sizes.batch, heads, sizes.tokens, query_key, value)

    def ours(chunk: int) -> Contestant:
        function = partial(mlstm, chunk_size=chunk, backend=sizes.backend)
        return forward_and_backward(lambda *tensors: function(*tensors)[0], mlstm_inputs(*shape, Draw(**sizes.options)))

    def peer(kind: str, chunk: int, options: dict[str, int]) -> Contestant:
        function = peers.chunkwise_mlstm(kind, chunk, autocast_kernel_dtype=sizes.dtype, **options)
        inputs = mlstm_inputs(*shape, Draw(**sizes.options))
        return forward_and_backward(function, [peers.heads_first(tensor) for tensor in inputs])

    entries = [Entry(f"ours, chunks of {chunk}", partial(ours, chunk)) for chunk in sizes.mlstm_chunks]
    # With its default of four warps, Triton 3.6 ends the process: an assertion of its compiler fails.
    for kind, chunk, options in (("triton_xl_chunk", 128, {"num_warps_intra": 8}), ("triton_limit_chunk", 64, {})):
        entries.append(Entry(f"mlstm_kernels, {kind}, {chunk}", partial(peer, kind, chunk, options), is_peer=True))
    description = f"batch {sizes.batch}, {heads} heads, queries of {query_key}, values of {value}, {sizes.dtype}"
    least = mlstm_flops(*shape), mlstm_bytes(*shape, sizes.dtype.itemsize)
    return Problem("mlstm", description, sizes.tokens, *least, tuple(entries))


def _ssd(sizes: Sizes) -> Problem:
    heads, size, state, groups = sizes.ssd
    leading = (sizes.batch, sizes.tokens)

    def inputs() -> list[Tensor]:
        """Values, step sizes, decay rates, keys, queries."""
        draw, exact = Draw(**sizes.options), Draw(sizes.device)
        return [
            draw(*leading, heads, size),
            exact(*leading, heads, shift=-3.0, scale=0.5).exp(),
            -exact(heads).exp(),
            *(draw(*leading, groups, state, scale=state**-0.5) for _ in range(2)),
        ]

    def ours(chunk: int) -> Contestant:
        function = partial(ssd, chunk_size=chunk, backend=sizes.backend)
        return forward_and_backward(lambda *tensors: function(*tensors)[0], inputs())

    def mamba() -> Contestant:
        return forward_and_backward(peers.mamba_ssd(chunk=256), inputs())

    def simple_gla() -> Contestant:
        return forward_and_backward(peers.simple_gla(), inputs())

    entries = [Entry(f"ours, chunks of {chunk}", partial(ours, chunk)) for chunk in sizes.ssd_chunks]
    entries.append(Entry("mamba_ssm, 256", mamba, is_peer=True))
    entries.append(Entry("flash-linear-attention, simple GLA", simple_gla, is_peer=True))
    # Written and read once per token; values and outputs, keys and queries, and what their gradients need.
    flops = 3.0 * 4 * sizes.batch * sizes.tokens * heads * size * state
    traffic = sizes.dtype.itemsize * sizes.batch * sizes.tokens * (5 * heads * size + 6 * groups * state)
    description = f"batch {sizes.batch}, {heads} heads of {size}, state of {state}, {groups} groups, {sizes.dtype}"
    return Problem("ssd", description, sizes.tokens, flops, float(traffic), tuple(entries))


def _newton(cell: NewtonCell, kind: str, sizes: Sizes, tokens: int) -> Problem:
    def ours() -> Contestant:
        return cell.contestant(cell.inputs(sizes.batch, tokens, sizes.width, Draw(**sizes.options)), sizes.backend)

    def peer() -> Contestant:
        return _dense(kind, sizes, tokens)

    return Problem(
        cell.kernel,
        f"batch {sizes.batch}, {sizes.width} channels, {sizes.dtype}",
        tokens,
        0.0,
        cell.bytes(sizes.batch, tokens, sizes.width, sizes.dtype.itemsize),
        (
            Entry(f"Newton, {tokens} tokens", ours),
            Entry(f"cuDNN's {kind} (dense, maps its input too), {tokens} tokens", peer, is_peer=True),
        ),
    )


def _dense(kind: str, sizes: Sizes, tokens: int) -> Contestant:
    module = peers.dense_recurrence(kind, sizes.width, **sizes.options)
    hidden = Draw(**sizes.options)(sizes.batch, tokens, sizes.width)
    return forward_and_backward(lambda inputs: module(inputs)[0], [hidden], list(module.parameters()))


def _slstm(sizes: Sizes) -> Problem:
    heads, tokens = sizes.slstm
    size = sizes.width // heads
    shape = (sizes.batch, heads, tokens, size)

    def ours() -> Contestant:
        inputs = slstm_inputs(*shape, Draw(**sizes.options))
        return forward_and_backward(lambda *tensors: slstm(*tensors, backend=sizes.backend)[0], inputs)

    return Problem(
        "slstm",
        f"batch {sizes.batch}, {heads} heads of {size}, {sizes.dtype}",
        tokens,
        slstm_flops(*shape),
        slstm_bytes(*shape, sizes.dtype.itemsize),
        (
            Entry("ours", ours),
            Entry("cuDNN's LSTM (dense, maps its input too)", partial(_dense, "LSTM", sizes, tokens), is_peer=True),
        ),
    )


def suite(sizes: Sizes = STANDARD) -> Suite:
    """What is timed on a CUDA device."""
    cells = {
        cell.kernel: [partial(_newton, cell, kind, sizes, tokens) for tokens in sizes.newton_tokens]
        for cell, kind in zip(NEWTON_CELLS, ("GRU", "LSTM"), strict=True)
    }
    return {
        "mlstm": [partial(_mlstm, sizes)],
        "ssd": [partial(_ssd, sizes)],
        **cells,
        "slstm": [partial(_slstm, sizes)],
    }
