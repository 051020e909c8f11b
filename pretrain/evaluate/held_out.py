"""Loss on held-out samples, in nats per token and bits per byte."""

from __future__ import annotations

import torch
from torch import nn

from data.order import rank_share
from data.samples import HeldOutSamples
from pretrain.models.decoder import Decoder
from pretrain.parallel.schedule import BatchLoss, run_schedule
from pretrain.parallel.topology import Topology


def held_out_indices(samples: HeldOutSamples, count: int) -> list[int]:
    """At most ``count`` samples, spread evenly over the split, the same at every evaluation."""
    total = samples.samples_per_epoch
    count = min(count, total)
    return [position * total // count for position in range(count)]


@torch.no_grad()
def evaluate_held_out(
    model: nn.Module,
    decoder: Decoder,
    samples: HeldOutSamples,
    count: int,
    micro_batch_size: int,
    topology: Topology,
) -> BatchLoss:
    """Evaluates at most ``count`` held-out samples over all ranks; every rank returns the same figures."""
    indices = held_out_indices(samples, count)
    # Indices behind the last sample are rows of padding: every rank runs equally many micro-batches.
    together = micro_batch_size * topology.data_size
    indices += [samples.samples_per_epoch] * (-len(indices) % together)
    shares = rank_share(indices, micro_batch_size, topology.data_rank, topology.data_size)
    batches = [samples.batch(share) for share in shares]
    was_training = decoder.training
    decoder.eval()
    loss = run_schedule(model, decoder, batches, topology.device, train=False)
    decoder.train(was_training)
    return loss
