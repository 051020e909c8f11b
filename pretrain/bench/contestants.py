"""What ``bench train`` times: our training step, the xlstm package's, and matrix products alone.

Both models hold the same weights, so that they do the same work; ours restarts its state at each document's
first token besides, as in training, which the peer cannot.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from data.batch import Batch
from pretrain.config import Config, parse_config
from pretrain.convert.xlstm import config_fields, tensor_names
from pretrain.models.decoder import Decoder
from pretrain.models.linear import ColumnParallelProjection, ColumnParallelProjections, RowParallelProjection
from pretrain.models.parameters import initialise_weights
from pretrain.parallel.build import build_engine, build_model
from pretrain.parallel.schedule import run_schedule
from pretrain.parallel.topology import build_topology

PEER_MODULE = "xlstm.xlstm_large.model"
INSTALL_PEER = "not installed: pip install 'recurrent-pretrain[bench]'"
SQUARE = (2048, 1024, 1024)
# As much work as a training step, so that its time is as little disturbed.
SQUARE_REPEATS = 10
_MEAN_DOCUMENT_LENGTH = 256


class PeerMissing(Exception):
    """The xlstm package, or what it needs, is not installed."""


@dataclass(frozen=True)
class Workload:
    """One training step of a float32 model on the CPU: mLSTM and SwiGLU in each layer."""

    batch_size: int = 4
    sequence_length: int = 512
    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    vocab_size: int = 256

    @property
    def tokens(self) -> int:
        return self.batch_size * self.sequence_length

    def config(self) -> Config:
        """The run that such a step belongs to: one process, replicated optimizer."""
        model = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_layers": self.num_layers,
            "layers": ["block"],
            "blocks": {
                "block": {
                    "mixer": {"type": "mlstm", "num_heads": self.num_heads},
                    "channel": {"type": "swiglu"},
                }
            },
            "output_logit_soft_cap": 30.0,
        }
        raw = {
            "run": {"directory": "unused"},
            "model": model,
            "data": {
                "source": {"type": "standard_library"},
                "tokenizer": {"type": "bytes"},
                "sequence_length": self.sequence_length,
            },
            "parallel": {"zero": 0},
            "optimizer": {"learning_rate": 1e-3},
            "train": {
                "steps": 1,
                "global_batch_size": self.batch_size,
                "micro_batch_size": self.batch_size,
                "device": "cpu",
            },
        }
        return parse_config(raw, "bench train")

    def batch(self) -> Batch:
        """Random tokens, labels and document starts, the same at every call."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch_size, self.sequence_length)
        tokens, labels = (torch.randint(0, self.vocab_size, shape, generator=generator) for _ in range(2))
        starts = torch.rand(shape, generator=generator) < 1 / _MEAN_DOCUMENT_LENGTH
        starts[:, 0] = True
        return Batch(tokens, labels, starts, label_bytes=self.tokens, label_count=self.tokens)


@dataclass(frozen=True)
class Contestant:
    """One row of the table.

    Attributes:
        name: of the row.
        run: does its work once; the models' return their mean loss in nats.
        prepare: called before each run, outside the time that is taken.
        tokens: that one run trains on; 0 for bare matrix products.
    """

    name: str
    run: Callable[[], Any]
    prepare: Callable[[], None]
    tokens: int


def randomise(model: nn.Module) -> None:
    """Fills what starts at one value with noise, so that no gradient is zero and no product is trivial."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() == 1 or parameter.std() == 0:
                scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
                parameter.add_(torch.empty_like(parameter).normal_(0.0, scale, generator=generator))


def our_model(workload: Workload) -> Decoder:
    """The decoder with random weights; joins a process group of one."""
    config = workload.config()
    build_topology(config)
    model = build_model(config)
    initialise_weights(model, seed=0)
    randomise(model)
    return model


def our_step(workload: Workload, model: Decoder) -> Contestant:
    """Forward and backward as ``pretrain train`` does them: Megatron-core's schedule, one micro-batch."""
    config, batch = workload.config(), workload.batch()
    topology = build_topology(config)
    engine = build_engine(model, config, topology)

    def run() -> float:
        with engine.accumulate():
            loss = run_schedule(engine.model, engine.decoder, [batch], topology.device, train=True)
        return loss.nats_per_token

    return Contestant("ours", run, lambda: model.zero_grad(set_to_none=True), workload.tokens)


def peer_model(workload: Workload, ours: Decoder) -> nn.Module:
    """The xlstm package's model with the weights of ``ours``.

    Raises:
        PeerMissing: the package or its kernels are not installed.
    """
    try:
        package = importlib.import_module(PEER_MODULE)
    except ImportError as error:
        raise PeerMissing(INSTALL_PEER) from error
    config = workload.config().model
    known = package.xLSTMLargeConfig.__dataclass_fields__
    fields = {name: value for name, value in config_fields(config).items() if name in known}
    # Of its kernels that run without a GPU and differentiate everything, the fastest.
    fields |= {"mode": "train", "chunkwise_kernel": "chunkwise--native_autograd"}
    model = package.xLSTMLarge(package.xLSTMLargeConfig(**fields))
    weights = ours.state_dict()
    names = {name: theirs.replace("backbone.embeddings", "embedding") for name, theirs in tensor_names(config).items()}
    model.load_state_dict({theirs: weights[name].clone() for name, theirs in names.items()})
    return model


def peer_step(workload: Workload, model: nn.Module) -> Contestant:
    """Forward, torch's cross-entropy and backward of the xlstm package's model."""
    batch = workload.batch()

    def run() -> float:
        logits, _ = model(batch.tokens)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
        loss.backward()
        return loss.item()

    return Contestant("xlstm package", run, lambda: model.zero_grad(set_to_none=True), workload.tokens)


def product_shapes(workload: Workload, model: Decoder) -> list[tuple[int, int, int]]:
    """(rows, inner, columns) of each product with a weight in one forward and backward."""
    sizes = []
    for module in model.modules():
        if isinstance(module, ColumnParallelProjections):
            sizes.append((getattr(module, f"{module.names[0]}_weight").shape[1], sum(module.sizes.values())))
        elif isinstance(module, (ColumnParallelProjection, RowParallelProjection)):
            sizes.append((module.weight.shape[1], module.weight.shape[0]))
    shapes = []
    for inputs, outputs in sizes:
        shapes += [
            (workload.tokens, inputs, outputs),  # the product itself
            (workload.tokens, outputs, inputs),  # gradient of its input
            (outputs, workload.tokens, inputs),  # gradient of its weight
        ]
    return shapes


def matrix_products(name: str, shapes: list[tuple[int, int, int]]) -> Contestant:
    """Random matrices of the given (rows, inner, columns), multiplied into buffers that are there already."""
    generator = torch.Generator().manual_seed(2)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator)

    operands = {
        shape: (matrix(shape[0], shape[1]), matrix(shape[1], shape[2]), torch.empty(shape[0], shape[2]))
        for shape in set(shapes)
    }

    def run() -> None:
        for shape in shapes:
            left, right, result = operands[shape]
            torch.mm(left, right, out=result)

    return Contestant(name, run, lambda: None, 0)
