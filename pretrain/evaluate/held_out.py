"""Loss on held-out samples, in nats per token and bits per byte, of all of them and of each source of a mixture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from data.batch import IGNORED_LABEL, Batch
from data.order import rank_share
from data.samples import ConcatenatedSamples, HeldOutSamples
from pretrain.models.decoder import Decoder
from pretrain.parallel.schedule import BatchLoss, run_schedule
from pretrain.parallel.topology import Topology


@dataclass(frozen=True)
class HeldOutLoss:
    """Loss on held-out samples, the same on every rank.

    Attributes:
        whole: over all samples.
        sources: of each source of a mixture that any sample came from, by name; empty where there is no mixture.
    """

    whole: BatchLoss
    sources: dict[str, BatchLoss]


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
) -> HeldOutLoss:
    """Evaluates at most ``count`` held-out samples over all ranks; every rank returns the same figures.

    Sources are told apart by the rows of the same passes, so a mixture takes no longer.
    """
    indices = held_out_indices(samples, count)
    # Indices behind the last sample are rows of padding: every rank runs equally many micro-batches.
    together = micro_batch_size * topology.data_size
    indices += [samples.samples_per_epoch] * (-len(indices) % together)
    shares = rank_share(indices, micro_batch_size, topology.data_rank, topology.data_size)
    batches = [samples.batch(share) for share in shares]
    was_training = decoder.training
    decoder.eval()
    nats_of_rows: list[Tensor] = []
    whole = run_schedule(model, decoder, batches, topology.device, train=False, nats_of_rows=nats_of_rows)
    decoder.train(was_training)
    if not isinstance(samples, ConcatenatedSamples):
        return HeldOutLoss(whole, {})
    places = [[list(samples.sources).index(samples.source_of(index)) for index in share] for share in shares]
    return HeldOutLoss(whole, _by_source(samples, batches, places, nats_of_rows, topology.device))


def _by_source(
    samples: ConcatenatedSamples,
    batches: Sequence[Batch],
    places: Sequence[Sequence[int]],
    nats_of_rows: Sequence[Tensor],
    device: torch.device,
) -> dict[str, BatchLoss]:
    """Sums of rows over all ranks, by source; ``places`` are the numbers of the rows' sources."""
    # Nats, labels and bytes of each source.
    totals = torch.zeros(len(samples.sources), 3, dtype=torch.float64)
    byte_lengths = torch.from_numpy(samples.format.token_byte_lengths).double()
    # Stages before the last have no losses.
    for place, batch, nats in zip(places, batches, nats_of_rows or [None] * len(batches), strict=True):
        rows = torch.tensor(place)
        counts = batch.labels != IGNORED_LABEL
        sizes = byte_lengths[batch.labels.where(counts, samples.format.boundary_id)].sum(dim=1)
        of_rows = torch.stack([torch.zeros(len(rows)) if nats is None else nats.cpu(), counts.sum(dim=1), sizes], dim=1)
        totals.index_add_(0, rows, of_rows.double())
    # Gloo reduces what lies in one piece, and slices of columns do not.
    nats, known = totals[:, :1].contiguous().to(device), totals[:, 1:].contiguous().to(device)
    # As in run_schedule: ranks that hold segments of the same sequences each know of all of their labels.
    dist.all_reduce(known, group=parallel_state.get_data_parallel_group())
    dist.all_reduce(nats, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    dist.all_reduce(nats, group=parallel_state.get_pipeline_model_parallel_group())
    found = {}
    for name, (total, labels, size) in zip(samples.sources, torch.cat([nats, known], dim=1).tolist(), strict=True):
        if labels:
            found[name] = BatchLoss(total, int(labels), int(size))
    return found
