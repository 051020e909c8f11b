"""The most that one process holds in an optimizer step, as a plan says, against what torch holds."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretrain.config import Config
from pretrain.models.parameters import initialise_weights
from pretrain.parallel.build import build_engine, build_model
from pretrain.parallel.topology import build_topology
from pretrain.plan import plan
from tests.parallel.programs import one_step
from tests.plan.conftest import ONE_PROCESS

# Norms as torch fuses them without a GPU; rows long enough that activations outweigh all else.
SETTINGS = ("model.norm=layer", "train.global_batch_size=2", "train.micro_batch_size=2", "data.sequence_length=256")


class _Held(TorchDispatchMode):
    """The most bytes of storages that were made and not yet let go."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.most = known, 0
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.storages = {key: held for key, held in self.storages.items() if not held[0].expired()}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in self.known:
                storage = leaf.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.most = max(self.most, sum(size for _, size in self.storages.values()))
        return result


# Where blocks of a mixer and large experts are computed again, a plan says up to a quarter too much: it adds what both
# keep to what the mixer needs at work, though the experts' part is gone by then.
@pytest.mark.parametrize(
    ("family", "recompute"),
    [("mamba2", "none"), ("mamba2", "block"), ("hybrid_moe", "none"), ("hnet_1stage", "none")],
)
def test_a_step_holds_within_a_tenth_of_what_is_planned(
    load: Callable[..., Config], family: str, recompute: str
) -> None:
    config = load(f"runs/{family}_tiny.yaml", *ONE_PROCESS, *SETTINGS, f"train.recompute={recompute}")
    topology = build_topology(config)
    model = build_model(config)
    initialise_weights(model, 0)
    engine = build_engine(model, config, topology)
    # The first step makes the moments, and what modules keep for good.
    one_step(config, topology, engine, 0)
    model.take_metrics()
    gc.collect()
    kept = [*model.parameters(), *(value for state in engine.optimizer.state.values() for value in state.values())]
    fixed = sum(tensor.numel() * tensor.element_size() for tensor in kept)
    held = _Held({tensor.untyped_storage()._cdata for tensor in kept})
    with held:
        one_step(config, topology, engine, 1)
    if config.model.hierarchy is not None:
        # A model that has not been trained chooses as many chunks as it happens to.
        measured = config.model.hierarchy.measured(model.take_metrics())
        config = config.model_copy(update={"model": config.model.model_copy(update={"hierarchy": measured})})
    assert fixed + held.most == pytest.approx(plan(config, 1).bytes_per_rank, rel=0.1)
