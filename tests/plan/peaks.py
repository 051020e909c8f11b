"""The most that a rank holds in an optimizer step, with the kernels of a GPU on machines that have none.

Plans are of GPUs. Where a kernel would be launched nothing is computed here, so that values are zeros; the tensors that
the functions round it make are those that they make on a GPU, and they are what counts.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels.newton_rnn
from data.order import rank_share
from kernels import launch
from pretrain.config import Config
from pretrain.models.parameters import initialise_weights
from pretrain.parallel.build import build_engine, build_model
from pretrain.parallel.engine import Engine
from pretrain.parallel.schedule import run_schedule
from pretrain.parallel.topology import Topology, build_topology
from tests.models.hat_models import random_words
from tests.parallel.programs import synthetic_batch

# Where the functions that have Triton kernels are called.
USERS = {
    "pretrain.models.hierarchy.hnet.dechunking": ["affine_scan"],
    "pretrain.models.mamba2.mixer": ["causal_conv1d", "ssd"],
    "pretrain.models.mlstm.mixer": ["mlstm"],
    "pretrain.models.mlstm_pre_up.mixer": ["causal_conv1d", "mlstm"],
    "pretrain.models.newton_block": ["causal_conv1d"],
    "pretrain.models.slstm.mixer": ["causal_conv1d", "slstm"],
}


@contextlib.contextmanager
def kernels_of_a_gpu() -> Iterator[None]:
    """Has models take the Triton forms of their kernels, whose launches do nothing."""

    def choose_backend(backend: str, elements: int, is_cuda: bool, is_double: bool, has_kernel: bool) -> str:
        return "triton" if has_kernel else "torch"

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(launch.Launch, "run", lambda self: None))
        stack.enter_context(mock.patch.object(launch, "interpreter_is_active", lambda: True))
        stack.enter_context(mock.patch.object(kernels.newton_rnn, "choose_backend", choose_backend))
        for name, functions in USERS.items():
            module = importlib.import_module(name)
            for function in functions:
                with_triton = functools.partial(getattr(module, function), backend="triton")
                stack.enter_context(mock.patch.object(module, function, with_triton))
        yield


class Held(TorchDispatchMode):
    """The most bytes of storages that operations returned and that were not let go, those of ``known`` left out."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.most, self.upper_bound = 0, 0
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        is_unfilled = "empty" in function.name()
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                if is_unfilled:
                    # What a kernel would have filled.
                    leaf.zero_()
                self._add(leaf.untyped_storage())
        # Looking which are gone takes long, so only where there might be more than ever before.
        if self.upper_bound > self.most:
            self.storages = {key: held for key, held in self.storages.items() if not held[0].expired()}
            self.upper_bound = sum(size for _, size in self.storages.values())
            self.most = max(self.most, self.upper_bound)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.known or (key in self.storages and not self.storages[key][0].expired()):
            return
        self.storages[key] = (StorageWeakRef(storage), storage.nbytes())
        self.upper_bound += storage.nbytes()


def tensors_alive() -> list[Tensor]:
    """Every tensor of this process that Python knows and that has memory."""
    gc.collect()
    found = [thing for thing in gc.get_objects() if type(thing) in (Tensor, torch.nn.Parameter)]
    return [tensor for tensor in found if not tensor.is_meta]


def step_with_words(config: Config, topology: Topology, engine: Engine, step: int) -> None:
    """An optimizer step over synthetic batches that say where words start."""
    size = config.train.global_batch_size
    indices = range(step * size, (step + 1) * size)
    batches = []
    for share in rank_share(indices, config.train.micro_batch_size, topology.data_rank, topology.data_size):
        batch = synthetic_batch(share, config.data.sequence_length)
        rows = zip(batch.document_starts, share, strict=True)
        words = torch.stack([random_words(starts, index) for starts, index in rows])
        batches.append(replace(batch, word_starts=words))
    with engine.accumulate():
        run_schedule(engine.model, engine.decoder, batches, topology.device, train=True)
    assert engine.step(1e-3).applied


def most_held(config: Config) -> tuple[int, Config]:
    """The most that this rank holds in an optimizer step, in bytes; and the configuration with the chunks there were.

    What was there before is not counted.
    """
    before = {tensor.untyped_storage()._cdata for tensor in tensors_alive()}
    topology = build_topology(config)
    model = build_model(config)
    initialise_weights(model, 0)
    engine = build_engine(model, config, topology)
    # The first step makes the moments, and what modules keep for good.
    step_with_words(config, topology, engine, 0)
    model.take_metrics()
    alive = tensors_alive()
    lasting = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in alive}
    with kernels_of_a_gpu(), Held(alive) as held:
        step_with_words(config, topology, engine, 1)
    hierarchy = config.model.hierarchy
    if hierarchy is not None:
        # A model that has not been trained chooses as many chunks as it happens to.
        measured = hierarchy.measured(model.take_metrics())
        config = config.model_copy(update={"model": config.model.model_copy(update={"hierarchy": measured})})
    return sum(size for key, size in lasting.items() if key not in before) + held.most, config
