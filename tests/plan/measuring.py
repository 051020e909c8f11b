"""What the tests of plans measure on a model: FLOPs as torch counts them, and bytes that stay alive."""

from __future__ import annotations

import gc
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from pretrain.config import Config
from pretrain.models.building import build_decoder
from pretrain.models.carried import initial_carried
from pretrain.models.decoder import Decoder
from pretrain.models.mixer import Documents
from pretrain.parallel.topology import build_topology, megatron_config
from tests.conformance.declarations import FLOP_FORMULAS


def build(config: Config) -> Decoder:
    """The model on one process, its parameters not yet filled."""
    build_topology(config)
    return build_decoder(config.model, megatron_config(config))


def flop_counter() -> FlopCounterMode:
    """Torch's counter, taught what it leaves out."""
    return FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS)


class Allocations(TorchDispatchMode):
    """Remembers every storage that an operation returns, without keeping it alive."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def bytes_alive(self) -> int:
        gc.collect()
        return sum(size for reference, size in self.storages.values() if not reference.expired())


def bytes_kept(model: Decoder, sequence_length: int, layer: int = 0, batch: int = 1) -> int:
    """Bytes alive between a block's forward and backward pass on this rank, its output included, its input not."""
    here = sequence_length // (model.config.tensor_model_parallel_size if model.config.sequence_parallel else 1)
    hidden = torch.randn(here, batch, model.model.hidden_size, dtype=model.compute_dtype)
    starts = torch.zeros(batch, sequence_length, dtype=torch.bool)
    with Allocations() as allocations:
        given = initial_carried(hidden, model.carried_channels)
        output, state, carried = model.layers[str(layer)](hidden.requires_grad_(), None, Documents(starts), given)
        # What the layer before has handed on is that one's to count.
        for tensor in given.values():
            allocations.storages.pop(tensor.untyped_storage()._cdata, None)
        del state, carried
    # Threads that sent tensors let go of them a little later.
    for _ in range(4):
        dist.barrier()
    kept = allocations.bytes_alive()
    assert output.requires_grad
    return kept
