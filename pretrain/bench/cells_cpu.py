"""What ``bench kernels`` times on a CPU, float32."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from kernels.mlstm import mlstm
from kernels.slstm import slstm
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
from pretrain.bench.cells_models import Mamba2Workload, mamba2_problem
from pretrain.bench.contestants import SQUARE, Contestant, matrix_products

_FLOAT32 = 4


@dataclass(frozen=True)
class Sizes:
    """Sizes of all problems.

    Attributes:
        mlstm: batch, heads, tokens, channels of a query and of a value.
        chunks: tokens per chunk that each form of the mLSTM is timed with.
        newton: batch, channels and lengths of ParaGRU and ParaLSTM: few channels, where a loop waits for each
            operation to be dispatched, and many, where it does not.
        slstm: batch, heads, tokens, channels of a head.
        mamba2: a whole model's training step.
        square: product whose rate bounds matrix products.
        copied: numbers copied in the copy whose rate bounds the rest.
    """

    mlstm: tuple[int, int, int, int, int] = (1, 4, 2048, 64, 128)
    chunks: tuple[int, ...] = (64, 128)
    newton: tuple[tuple[int, int, tuple[int, ...]], ...] = (
        (1, 256, (512, 1024, 2048, 4096, 8192)),
        (4, 1024, (512, 2048)),
    )
    slstm: tuple[int, int, int, int] = (4, 4, 512, 64)
    mamba2: Mamba2Workload = Mamba2Workload()
    square: tuple[int, int, int] = SQUARE
    copied: int = 1 << 24


STANDARD = Sizes()


def bounds(sizes: Sizes = STANDARD) -> Bounds:
    """A float32 product and copy."""
    source, target = torch.randn(sizes.copied), torch.empty(sizes.copied)
    rows, inner, columns = sizes.square
    product = matrix_products("product", [sizes.square])
    copy = Contestant("copy", lambda: target.copy_(source), lambda: None, 0)
    return Bounds(product, 2.0 * rows * inner * columns, copy, 2.0 * source.nbytes)


def _mlstm(sizes: Sizes) -> Problem:
    batch, heads, tokens, query_key, value = sizes.mlstm

    def ours(chunk: int) -> Contestant:
        inputs = mlstm_inputs(*sizes.mlstm, Draw())
        return forward_and_backward(lambda *tensors: mlstm(*tensors, chunk_size=chunk, backend="torch")[0], inputs)

    def peer(kind: str, chunk: int) -> Contestant:
        function = peers.chunkwise_mlstm(kind, chunk)
        return forward_and_backward(
            function, [peers.heads_first(tensor) for tensor in mlstm_inputs(*sizes.mlstm, Draw())]
        )

    entries = [Entry(f"ours, chunks of {chunk}", lambda chunk=chunk: ours(chunk)) for chunk in sizes.chunks]
    for kind, label in (("native_autograd", "autograd"), ("native_custbw", "custom backward")):
        for chunk in sizes.chunks:
            name = f"mlstm_kernels, {label}, {chunk}"
            entries.append(Entry(name, lambda kind=kind, chunk=chunk: peer(kind, chunk), is_peer=True))
    description = f"batch {batch}, {heads} heads, queries of {query_key}, values of {value}"
    least = mlstm_flops(*sizes.mlstm), mlstm_bytes(*sizes.mlstm, _FLOAT32)
    note = "mlstm_kernels' custom backward leaves out the gradient of the denominator"
    return Problem("mlstm", description, tokens, *least, tuple(entries), note)


def _newton(cell: NewtonCell, batch: int, channels: int, tokens: int) -> Problem:
    def build(backend: str) -> Contestant:
        return cell.contestant(cell.inputs(batch, tokens, channels, Draw()), backend)

    return Problem(
        cell.kernel,
        f"batch {batch}, {channels} channels",
        tokens,
        0.0,
        cell.bytes(batch, tokens, channels, _FLOAT32),
        (
            Entry(f"Newton, {tokens} tokens", lambda: build("torch")),
            Entry(f"loop over {tokens} tokens", lambda: build("reference")),
        ),
        "the same gates; the loop is the recurrence as it is written down, by torch's autograd",
    )


def _slstm(sizes: Sizes) -> Problem:
    batch, heads, tokens, size = sizes.slstm

    def ours() -> Contestant:
        inputs = slstm_inputs(*sizes.slstm, Draw())
        return forward_and_backward(lambda *tensors: slstm(*tensors, backend="torch")[0], inputs)

    def peer() -> Contestant:
        gates, recurrent, bias = slstm_inputs(*sizes.slstm, Draw())
        cell = peers.slstm_cell(recurrent, bias, batch)
        return forward_and_backward(lambda flat: cell(flat)[0], [gates.flatten(2)], list(cell.parameters()))

    return Problem(
        "slstm",
        f"batch {batch}, {heads} heads of {size}",
        tokens,
        slstm_flops(*sizes.slstm),
        slstm_bytes(*sizes.slstm, _FLOAT32),
        (Entry("ours", ours), Entry("xlstm package, vanilla cell", peer, is_peer=True)),
        "same weights",
    )


def suite(sizes: Sizes = STANDARD) -> Suite:
    """What is timed on a CPU."""
    cells = {
        cell.kernel: [
            partial(_newton, cell, batch, channels, tokens)
            for batch, channels, lengths in sizes.newton
            for tokens in lengths
        ]
        for cell in NEWTON_CELLS
    }
    return {
        "mlstm": [partial(_mlstm, sizes)],
        "mamba2": [partial(mamba2_problem, sizes.mamba2)],
        **cells,
        "slstm": [partial(_slstm, sizes)],
    }
