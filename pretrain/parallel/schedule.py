"""Runs the micro-batches of one step through Megatron-core's schedule (1F1B where there are stages)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from data.batch import Batch
from pretrain.models.decoder import Decoder
from pretrain.parallel.no_cuda import cuda_tensors_on_cpu


@dataclass(frozen=True)
class BatchLoss:
    """Loss over a global batch, the same on every rank.

    Attributes:
        nats: cross-entropy summed over every label that counts.
        labels: how many labels count.
        bytes: bytes of text that they stand for.
    """

    nats: float
    labels: int
    bytes: int

    @property
    def nats_per_token(self) -> float:
        return self.nats / max(self.labels, 1)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / max(self.bytes, 1)


class _ScheduledModel(nn.Module):
    """What the schedule sees: the engine's model, with the decoder's attributes that schedules ask for."""

    def __init__(self, model: nn.Module, decoder: Decoder):
        super().__init__()
        object.__setattr__(self, "_called", model)
        self.config, self.model_type = decoder.config, decoder.model_type
        self.set_input_tensor = decoder.set_input_tensor

    def forward(self, *inputs: Tensor) -> Tensor:
        return self._called(*inputs)


def run_schedule(
    model: nn.Module,
    decoder: Decoder,
    micro_batches: Sequence[Batch],
    device: torch.device,
    train: bool,
    passes: AbstractContextManager[None] | None = None,
    nats_of_rows: list[Tensor] | None = None,
) -> BatchLoss:
    """Forward, and backward if ``train``, over this rank's micro-batches of one global batch.

    ``passes`` is entered for the passes alone, not for what ranks tell each other before and after. ``nats_of_rows``
    takes, on the last stage, each micro-batch's nats by row, ``(batch,)`` float32, of this rank's segment.

    Gradients are those of the mean over every label of the *global* batch that counts, however labels are
    spread over micro-batches and ranks. All ranks of a data-parallel group must bring equally many
    micro-batches of the same shape.
    """
    totals = torch.tensor(
        [0.0, sum(batch.label_count for batch in micro_batches), sum(batch.label_bytes for batch in micro_batches)],
        dtype=torch.float64,
        device=device,
    )
    # Ranks that hold segments of the same sequences each know of all of their labels.
    dist.all_reduce(totals[1:], group=parallel_state.get_data_parallel_group())
    # The schedule divides by the number of micro-batches and multiplies by that of segments, and engines average over
    # all ranks that hold the same weights, those of all segments too.
    data_size = parallel_state.get_data_parallel_world_size()
    labels = max(totals[1].item(), 1.0)
    scale = len(micro_batches) * data_size / labels
    segments = parallel_state.get_context_parallel_world_size()
    if segments > 1:
        multiple = decoder.config.tensor_model_parallel_size if decoder.config.sequence_parallel else 1
        place = parallel_state.get_context_parallel_rank()
        micro_batches = [batch.segment(place, segments, multiple) for batch in micro_batches]

    def forward_step(batches: Iterator[Batch], called: nn.Module) -> tuple[Tensor, object]:
        batch = next(batches).to(device)
        output = called(*decoder.inputs(batch))

        def loss_function(nats: Tensor) -> tuple[Tensor, Tensor]:
            if nats_of_rows is not None:
                nats_of_rows.append(decoder.nats_of_rows)
            return nats * scale, nats.detach().clone()

        return output, loss_function

    def with_what_is_carried(*sides: list[tuple[int, int, int]]) -> tuple[list[tuple[int, int, int]], ...]:
        """Shapes of the tensors that a stage receives and sends, made wide enough."""
        more = decoder.packed_channels
        return tuple([(length, batch, width + more) for length, batch, width in shapes] for shapes in sides)

    batch_size, sequence_length = micro_batches[0].tokens.shape
    has_stages = parallel_state.get_pipeline_model_parallel_world_size() > 1
    with passes or nullcontext(), cuda_tensors_on_cpu(), torch.set_grad_enabled(train):
        decoder.prepare_batch(model, micro_batches, labels, train)
        losses = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(micro_batches),
            model=[_ScheduledModel(model, decoder)],
            num_microbatches=len(micro_batches),
            # Of whole sequences, which it divides by the number of segments.
            seq_length=sequence_length * segments,
            micro_batch_size=batch_size,
            forward_only=not train,
            # Refused where there is one stage.
            adjust_tensor_shapes_fn=with_what_is_carried if has_stages and decoder.packed_channels else None,
        )
        if passes is not None and device.type == "cuda":
            torch.cuda.synchronize()
    if decoder.chain is not None:
        decoder.chain.finish()
    if losses:
        totals[0] = torch.stack([loss.double() for loss in losses]).sum()
        dist.all_reduce(totals[:1], group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    # Only the last stage knows the loss; the others add zero.
    dist.all_reduce(totals[:1], group=parallel_state.get_pipeline_model_parallel_group())
    nats, labels, size = totals.tolist()
    return BatchLoss(nats, int(labels), int(size))
