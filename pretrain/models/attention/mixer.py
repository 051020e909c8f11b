"""The attention mixer. Heads are split over ranks; keys that heads of several ranks share are on each of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from kernels.segments import Segments, Told
from pretrain.models.attention.attend import attend
from pretrain.models.attention.config import AttentionConfig
from pretrain.models.attention.rotary import angles, rotate
from pretrain.models.linear import ColumnParallelProjections, Projection, RowParallelProjection
from pretrain.models.mixer import Documents, LayerContext, SequenceMixer, State, StateTensor
from pretrain.models.parameters import ParameterSpec, constant, new_parameter, small_normal, wang_normal


def positions_of(state: State | None, documents: Documents | None, length: int, device: torch.device) -> Tensor:
    """How many tokens of its document came before each token, ``(batch or 1, length)`` int64."""
    index = torch.arange(length, device=device)[None]
    positions = index if state is None else index + state["position"].detach().long()[:, None]
    if documents is None:
        return positions
    latest = torch.where(documents.starts, index, -1).cummax(1).values
    return torch.where(latest < 0, positions, index - latest)


def start_length_exchange(
    segments: Segments, documents: Documents | None, batch: int, length: int, device: torch.device
) -> Callable[[], Tensor]:
    """To be called when other work is done: how many tokens of the document that this segment goes on with are in
    earlier ones, (batch,) float32.
    """
    begins = torch.zeros(batch, device=device)
    tail = torch.full((batch,), float(length), device=device)
    if documents is not None:
        latest = documents.starts * torch.arange(1, length + 1, device=device)
        begins, tail = documents.starts.any(1).float(), length + 1 - latest.amax(1).clamp(min=1).float()
    arriving = segments.start_all_gather(torch.stack([begins, tail]))

    def length_before() -> Tensor:
        before = torch.zeros_like(tail)
        for begins_there, tail_there in arriving.wait()[: segments.rank]:
            before = torch.where(begins_there > 0, tail_there, before + tail_there)
        return before

    return length_before


class Attention(SequenceMixer):
    """Causal attention with grouped queries, rotary positions and a window, each where asked for.

    A token sees those of its own document alone, and positions begin anew with each document. The state is the
    keys, rotated, and values read so far, the newest last, and how many tokens of its document each sequence has read:
    of the keys only so many of the last ones count. With a window of ``w`` tokens, ``w - 1`` are kept.
    """

    def __init__(self, config: AttentionConfig, context: LayerContext):
        super().__init__()
        self.config = config
        width, heads, key_heads = context.hidden_size, config.num_heads, config.key_value_heads
        self.head = config.size_of_head(width)
        self.rotary_size = config.rotary_size(width)
        self.scale = self.head**-0.5 if config.softmax_scale is None else config.softmax_scale
        ranks = context.tensor_parallel
        self.local_heads = heads // ranks
        shared = key_heads % ranks != 0
        self.heads_per_key = heads // key_heads

        split = ParameterSpec(small_normal(width), shard_dimension=0)
        whole = ParameterSpec(small_normal(width), partial_gradient=True)
        sizes = {"query": heads * self.head, "key": key_heads * self.head, "value": key_heads * self.head}
        specs = {"query": split, "key": whole if shared else split, "value": whole if shared else split}
        self.projections = ColumnParallelProjections(
            width, {name: Projection(size, specs[name]) for name, size in sizes.items()}, context.megatron
        )
        back = ParameterSpec(wang_normal(width, context.num_layers), shard_dimension=1)
        self.output = RowParallelProjection(heads * self.head, width, back, context.megatron)
        if config.bias:
            for name, size in sizes.items():
                bias = ParameterSpec(
                    constant(0.0),
                    specs[name].shard_dimension,
                    weight_decay=False,
                    partial_gradient=specs[name].partial_gradient,
                )
                self.register_parameter(f"{name}_bias", new_parameter((size,), bias))
        if config.has_output_bias:
            # Under sequence parallelism a rank adds it to its part of the sequence.
            bias = ParameterSpec(constant(0.0), weight_decay=False, partial_gradient=context.megatron.sequence_parallel)
            self.output_bias = new_parameter((width,), bias)
        if config.query_key_norm:
            for name in ("query", "key"):
                norm = ParameterSpec(constant(1.0), weight_decay=False, partial_gradient=True)
                self.register_parameter(f"{name}_norm_weight", new_parameter((self.head,), norm))
        rows = StateTensor((None, key_heads, self.head), None if shared else 1)
        self.states = {"key": rows, "value": rows, "position": StateTensor((), None)}
        # Which of the keys held here each of this rank's query heads sees.
        first = 0 if not shared else self.local_heads * parallel_state.get_tensor_model_parallel_rank()
        self.key_of_head = [(first + head) // self.heads_per_key for head in range(self.local_heads)]

    def state_tensors(self) -> dict[str, StateTensor]:
        return self.states

    def _by_heads(self, name: str, projected: Tensor) -> Tensor:
        """Queries, keys or values before rotation, ``(batch, sequence, heads, size)``."""
        if self.config.bias:
            projected = projected + getattr(self, f"{name}_bias").to(projected.dtype)
        rows = projected.unflatten(-1, (-1, self.head)).transpose(0, 1)
        if self.config.query_key_norm and name != "value":
            weight = getattr(self, f"{name}_norm_weight")
            normed = nn.functional.rms_norm(rows.float(), (self.head,), weight, self.config.norm_epsilon)
            rows = normed.to(projected.dtype)
        return rows

    def _start_exchange(
        self, segments: Segments, key: Tensor, value: Tensor
    ) -> Callable[[], tuple[Tensor, Tensor, int]]:
        """To be called when other work is done: keys and values of earlier segments, as far as this one sees them, and
        its own; how many are in front."""
        both, length, window = torch.stack([key, value]), key.shape[1], self.config.sliding_window
        reach = segments.size * length if window is None else window - 1
        if reach == 0:
            return lambda: (key, value, 0)
        if reach <= length:
            told = Told(segments, both[:, :, length - reach :], "next")
            # On the first rank zeros, which no token's position lets it see.
            return lambda: (*torch.cat([told.take(), both], 2).unbind(), reach)
        # Its own come back with the others', so that the gradients of all ranks are summed in one call.
        told = Told(segments, both, "everyone")
        past = min(reach, segments.rank * length)

        def with_earlier() -> tuple[Tensor, Tensor, int]:
            rows = told.take()[: segments.rank + 1].permute(1, 2, 0, 3, 4, 5).flatten(2, 3)
            return *rows[:, :, segments.rank * length - past :].unbind(), past

        return with_earlier

    def _used(self, rows: Tensor) -> Tensor:
        """Of keys or values ``(batch, tokens, heads, size)``, the heads that this rank's query heads see, in turn."""
        used = list(dict.fromkeys(self.key_of_head))
        each = self.local_heads // len(used)
        if self.key_of_head == [head for head in used for _ in range(each)]:
            return rows[:, :, used[0] : used[-1] + 1]
        # Query heads of this rank share them unevenly.
        return rows[:, :, self.key_of_head]

    def _earliest(self, positions: Tensor, past: int, documents: Documents | None) -> Tensor | None:
        """What :func:`attend` asks for: the first key that each token sees, the keys of ``past`` tokens in front."""
        length, window = positions.shape[1], self.config.sliding_window
        is_cut = window is not None and window < length
        # Asking a GPU whether a document begins within the sequence would be to wait for it.
        begins = documents is not None and (documents.starts.is_cuda or bool(documents.starts[:, 1:].any()))
        if not (past or is_cut or begins):
            return None
        reach = positions if window is None else positions.clamp(max=window - 1)
        return (torch.arange(past, past + length, device=positions.device) - reach).clamp(min=0)

    def forward(
        self, hidden: Tensor, state: State | Segments | None, documents: Documents | None
    ) -> tuple[Tensor, State]:
        segments = state if isinstance(state, Segments) else None
        (key, value), later = self.projections.in_turn(hidden, ("query",), apart=segments is not None)
        batch, length = key.shape[1], key.shape[0]
        if segments is not None:
            length_before = start_length_exchange(segments, documents, batch, length, hidden.device)
        key, value = self._by_heads("key", key), self._by_heads("value", value)
        if segments is not None:
            state = {"position": length_before()}
        positions = positions_of(state, documents, length, hidden.device)
        if self.rotary_size:
            cosines, sines = angles(positions, self.rotary_size, self.config.rotary_base, self.config.rotary_scaling)
            key = rotate(key, cosines, sines)

        if segments is not None:
            with_earlier = self._start_exchange(segments, key, value)
        query = self._by_heads("query", *later())
        if self.rotary_size:
            query = rotate(query, cosines, sines)
        if segments is not None:
            key, value, past = with_earlier()
            kept_key, kept_value = key.float(), value.float()
        else:
            past = 0 if state is None else state["key"].shape[1]
            kept_key, kept_value = key.float(), value.float()
            if past:
                kept_key = torch.cat([state["key"], kept_key], 1)
                kept_value = torch.cat([state["value"], kept_value], 1)
                key, value = kept_key.to(key.dtype), kept_value.to(value.dtype)
        mixed = attend(
            query, self._used(key), self._used(value), self._earliest(positions, past, documents), self.scale
        )
        # The sequence first again.
        output = self.output(mixed.transpose(0, 1).flatten(2).contiguous())
        if self.config.has_output_bias:
            output = output + self.output_bias.to(output.dtype)

        dropped = 0
        if self.config.sliding_window is not None:
            dropped = max(0, past + length - self.config.sliding_window + 1)
        final = {"key": kept_key[:, dropped:], "value": kept_value[:, dropped:]}
        final["position"] = (positions[:, -1] + 1).expand(batch).float()
        return output, final


MIXER = Attention
