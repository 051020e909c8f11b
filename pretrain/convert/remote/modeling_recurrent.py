"""A decoder of recurrent and other mixers for ``transformers``, with the parameter names of its training.

``generate``, fine-tuning (a call with ``labels``) and ``save_pretrained`` work as for any causal language model. The
states of the layers are the ``past_key_values``. Documents packed into one sequence are kept apart where
``position_ids`` begin anew with each.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from pretrain.models.modeling import NORMS, Carried, State, all_float32_parameters

from .configuration_recurrent import RecurrentConfig
from .mixers import CHANNELS, MIXERS
from .recurrent_cache import (
    RecurrentCache,
    RowGroup,
    States,
    check_mask,
    document_starts,
    row_groups,
    split_documents,
    states_of,
)


class RecurrentBlock(GradientCheckpointingLayer):
    """``x + mixer(norm(x))``, then ``x + channel(norm(x))``."""

    def __init__(self, config: RecurrentConfig, block: dict[str, dict[str, Any]], hidden_size: int):
        super().__init__()
        norm = NORMS[config.norm]
        self.mixer = self.channel = None
        if "mixer" in block:
            settings = dict(block["mixer"])
            self.mixer_norm = norm(hidden_size, config.norm_epsilon)
            self.mixer = MIXERS[settings.pop("type")](hidden_size, **settings)
        if "channel" in block:
            settings = dict(block["channel"])
            self.channel_norm = norm(hidden_size, config.norm_epsilon)
            self.channel = CHANNELS[settings.pop("type")](hidden_size, **settings)

    @property
    def carried(self) -> dict[str, int]:
        """Channels of what the channel mixer hands to the blocks after it, by name."""
        return getattr(self.channel, "carried", {})

    def forward(self, hidden: Tensor, state: State | None, carried: Carried) -> tuple[Tensor, State | None, Carried]:
        """Maps ``(batch, sequence, hidden_size)`` to the same shape, from one state to the next."""
        if self.mixer is not None:
            mixed, state = self.mixer(self.mixer_norm(hidden), state)
            hidden = hidden + mixed
        if self.channel is not None:
            mixed = self.channel_norm(hidden)
            if self.carried:
                mixed, carried = self.channel(mixed, carried)
            else:
                mixed = self.channel(mixed)
            hidden = hidden + mixed
        return hidden, state, carried


def shared_modules(config: RecurrentConfig, names: Sequence[str], hidden_size: int) -> nn.ModuleDict:
    """What a network of blocks has once, however many of them use it, by name."""
    modules: dict[str, nn.Module] = {}
    for name in dict.fromkeys(names):
        for part, classes in (("mixer", MIXERS), ("channel", CHANNELS)):
            settings = dict(config.blocks[name].get(part, {}))
            made = getattr(classes[settings.pop("type")], "shared_modules", None) if settings else None
            modules |= {} if made is None else made(hidden_size, **settings)
    return nn.ModuleDict(modules)


def share(blocks: Iterable[RecurrentBlock], modules: nn.ModuleDict) -> None:
    """Gives blocks what their network has once; it does not become a part of them."""
    for block in blocks:
        for part in (block.mixer, block.channel):
            if part is not None:
                object.__setattr__(part, "shared", modules)


def initial_carried(hidden: Tensor, blocks: Iterable[RecurrentBlock]) -> Carried:
    """What the first block of a network finds: zeros for the positions of ``hidden``."""
    channels = {name: size for block in blocks for name, size in block.carried.items()}
    return {name: hidden.new_zeros(*hidden.shape[:2], size, dtype=torch.float32) for name, size in channels.items()}


class RecurrentForCausalLM(PreTrainedModel, GenerationMixin):
    """Embedding, blocks, norm, head."""

    config_class = RecurrentConfig
    supports_gradient_checkpointing = True
    _no_split_modules = ["RecurrentBlock"]
    _is_stateful = True
    _tied_weights_keys = {"head.weight": "embedding.weight"}

    def __init__(self, config: RecurrentConfig):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_size)
        self.layers = nn.ModuleList(
            RecurrentBlock(config, config.blocks[name], config.hidden_size) for name in config.layers
        )
        self.shared = shared_modules(config, config.layers, config.hidden_size)
        share(self.layers, self.shared)
        self.output_norm = NORMS[config.norm](config.embedding_size, config.norm_epsilon)
        self.head = nn.Linear(config.embedding_size, config.vocab_size, bias=False)
        self._make_further_modules()
        # transformers searches names for these patterns.
        self._keep_in_fp32_modules_strict = [f"^{re.escape(name)}$" for name in all_float32_parameters(self)]
        self.post_init()

    def _make_further_modules(self) -> None:
        """What a subclass has beside these."""

    @property
    def residual_streams(self) -> int:
        """How many tensors :meth:`_blocks` returns beside the embeddings."""
        return len(self.layers)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # Otherwise generate() would make a cache of its own kind.
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            if getattr(parameter, "_is_hf_initialized", False):
                continue
            if parameter.dim() > 1:
                parameter.normal_(0.0, self.config.initializer_range)
            else:
                parameter.fill_(1.0 if "norm" in name or isinstance(module, tuple(NORMS.values())) else 0.0)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: RecurrentCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **options: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """One call on ``(batch, sequence)`` tokens, or ``(batch, sequence, embedding_size)`` embeddings.

        Args:
            input_ids, inputs_embeds: exactly one of them.
            attention_mask: ``(batch, tokens so far)``, 0 for padding. Padding before a sequence is not read. Padding
                after it is, which changes nothing before it; but then there is no state to go on from.
            position_ids: ``(batch or 1, sequence)``. A document begins where they are 0, also within a sequence: it
                is read as a sequence of its own. What else they say changes nothing.
            past_key_values: as returned by the call on the tokens before these.
            labels: ``(batch, sequence)``, -100 where nothing counts; shifted here.
            use_cache: whether to return states; by default the configuration's choice, in evaluation only.
            output_hidden_states: whether to return the embeddings, and the residual stream after each block.
            return_dict: False returns a tuple.
            logits_to_keep: of the last so many tokens, or at these indices; 0: all.
            options: ``num_items_in_batch``, which divides the summed loss, and what a subclass hands to its blocks as
                ``word_starts``, ``(batch, sequence)``. Others change nothing.

        Raises:
            ValueError: not exactly one kind of input, a cache beside padding after a sequence, padding within one, or
                documents that are told apart otherwise than by ``position_ids``.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        hidden = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        batch, length = hidden.shape[:2]
        starts = document_starts(position_ids, batch, options)
        if attention_mask is not None:
            check_mask(attention_mask)
        padded_after = attention_mask is not None and bool((attention_mask[:, -length:].diff(dim=1) < 0).any())
        if padded_after and (use_cache or past_key_values is not None):
            raise ValueError("a sequence that ends in padding has no state to go on from; pad on the left")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and not padded_after
        if past_key_values is None:
            past_key_values = RecurrentCache(row_groups(attention_mask, batch, hidden.device))

        per_block, cache = self._read(hidden, past_key_values, options.get("word_starts"), starts)
        hidden = self.output_norm(per_block[-1])
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        logits = self.head(hidden if isinstance(kept, int) else hidden[:, kept]).float()
        cap = self.config.output_logit_soft_cap
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        loss = None
        if labels is not None:
            known = {name: value for name, value in options.items() if name == "num_items_in_batch"}
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **known)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=cache if use_cache else None,
            hidden_states=tuple(per_block) if output_hidden_states else None,
        )
        return output if return_dict or return_dict is None else output.to_tuple()

    def _read(
        self, hidden: Tensor, cache: RecurrentCache, further: Tensor | None = None, starts: Tensor | None = None
    ) -> tuple[list[Tensor], RecurrentCache]:
        """The residual stream before the first block and after each, and the states after these tokens.

        ``further`` and ``starts`` are ``(batch, sequence)``: what :meth:`_blocks` is also given, and where documents
        start.
        """
        length = hidden.shape[1]
        fresh = all(group.states is None for group in cache.groups)
        if starts is not None and not starts[:, 1 if fresh else 0 :].any():
            starts = None
        if starts is None and len(cache.groups) == 1 and cache.groups[0].padding <= cache.tokens:
            group = cache.groups[0]
            per_block, states = self._blocks(hidden, group.states, *([] if further is None else [further]))
            return per_block, RecurrentCache([RowGroup(group.rows, group.padding, states)], cache.tokens + length)
        per_block = [hidden, *(torch.zeros_like(hidden) for _ in range(self.residual_streams))]
        groups = []
        for group in cache.groups:
            skipped = min(max(group.padding - cache.tokens, 0), length)
            if skipped == length:
                groups.append(group)
                continue
            cut = torch.zeros(len(group.rows), length - skipped, dtype=torch.bool, device=hidden.device)
            if starts is not None:
                cut = starts[group.rows, skipped:]
            for documents in split_documents(cut, group.states is not None):
                rows, tokens = documents.places
                places = group.rows[rows], tokens + skipped
                states = states_of(group.states, documents.rows) if documents.goes_on else None
                given = [] if further is None else [further[places]]
                found, states = self._blocks(hidden[places], states, *given)
                for all_rows, part in zip(per_block[1:], found[1:], strict=True):
                    all_rows[places] = part
                if documents.is_last.any():
                    last = documents.is_last.nonzero()[:, 0]
                    rows_of_last = group.rows[documents.rows[last]]
                    groups.append(RowGroup(rows_of_last, group.padding, states_of(states, last)))
        return per_block, RecurrentCache(groups, cache.tokens + length)

    def _blocks(self, hidden: Tensor, states: States | None) -> tuple[list[Tensor], States]:
        per_block, final = [hidden], []
        carried = initial_carried(hidden, self.layers)
        for layer, block in enumerate(self.layers):
            hidden, state, carried = block(hidden, None if states is None else states[layer], carried)
            per_block.append(hidden)
            final.append(state)
        return per_block, final
