"""A whole Mamba-2 model for ``bench kernels``: ours, and transformers' with the same weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import nn

from pretrain.bench.cells import Entry, Problem
from pretrain.bench.contestants import Contestant, Workload, our_model, our_step
from pretrain.config import Config, parse_config
from pretrain.convert.mamba2 import MAMBA2
from pretrain.models.decoder import Decoder
from pretrain.plan import model_flops_per_token

# Ours by default, and transformers' by default.
PEER_CHUNKS = (64, 256)


@dataclass(frozen=True)
class Mamba2Workload(Workload):
    """One training step of a float32 model with nothing but Mamba-2 in its layers."""

    head_size: int = 64
    state_size: int = 128

    def config(self) -> Config:
        raw = super().config().model_dump(mode="json")
        mixer = {"type": "mamba2", "head_size": self.head_size, "state_size": self.state_size}
        # transformers has one epsilon for all norms, and no cap.
        mixer["norm_epsilon"] = raw["model"]["norm_epsilon"]
        raw["model"]["blocks"]["block"] = {"mixer": mixer}
        raw["model"]["output_logit_soft_cap"] = None
        return parse_config(raw, "bench kernels")


def transformers_model(workload: Mamba2Workload, ours: Decoder, chunk: int) -> nn.Module:
    """``Mamba2ForCausalLM`` in torch with the weights of ``ours``; ``chunk`` tokens at a time, as suits its speed."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = workload.config().model
    model = Mamba2ForCausalLM(Mamba2Config(**MAMBA2.config_fields(config) | {"use_cache": False, "chunk_size": chunk}))
    weights = {name: parameter.detach().clone() for name, parameter in ours.named_parameters()}
    model.load_state_dict(MAMBA2.tensors(config, weights))
    return model.train()


def transformers_step(workload: Mamba2Workload, model: nn.Module) -> Contestant:
    """Forward, torch's cross-entropy and backward."""
    batch = workload.batch()

    def run() -> float:
        logits = model(batch.tokens).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
        loss.backward()
        return loss.item()

    return Contestant("transformers", run, lambda: model.zero_grad(set_to_none=True), workload.tokens)


def mamba2_problem(workload: Mamba2Workload) -> Problem:
    """One training step; the bound is the products that ``pretrain plan`` counts, nothing masked or repeated."""
    model: list[Decoder] = []

    def ours() -> Contestant:
        model.append(our_model(workload))
        return our_step(workload, model[0])

    def peer(chunk: int) -> Contestant:
        return transformers_step(workload, transformers_model(workload, model[0], chunk))

    peers = [Entry(f"transformers, chunks of {chunk}", partial(peer, chunk), is_peer=True) for chunk in PEER_CHUNKS]
    return Problem(
        "mamba2",
        f"whole model, {workload.num_layers} layers of {workload.hidden_size}, batch {workload.batch_size}",
        workload.sequence_length,
        model_flops_per_token(workload.config()) * workload.tokens,
        0.0,
        (Entry("ours", ours), *peers),
        "same weights; ours restarts its state where documents start besides",
    )
