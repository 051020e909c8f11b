"""HAT for ``transformers``: bytes round layers that see one vector a word (Neitemeier et al. 2025, arXiv 2501.10322).

Words are those of the package ``hat-splitter`` for the text so far, unless a call says where they start. How the end
of a text is cut may change with the next byte, so there is no cache: ``generate`` reads the whole text for each byte.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from data.tokenizers.word_splitting import rest_of_character, word_lengths
from pretrain.models.modeling import NORMS, Projections, empty_parameter

from .block_stack import BlockStack
from .configuration_recurrent import RecurrentConfig
from .modeling_recurrent import RecurrentForCausalLM, initial_carried, shared_modules
from .recurrent_cache import States, document_starts


class WordPooling(nn.Module):
    """A word's vector from its bytes, by softmax attention of one learned query."""

    float32_parameters = ("query",)

    def __init__(self, config: RecurrentConfig):
        super().__init__()
        size = config.hierarchy["hidden_size"]
        self.head = size // config.hierarchy["num_heads"]
        self.norm = NORMS[config.norm](size, config.norm_epsilon)
        self.query = empty_parameter(size)
        self.projections = Projections(size, {"key": size, "value": size})
        self.output = nn.Linear(size, config.hidden_size, bias=False)

    def forward(self, encoded: Tensor, word: Tensor, words: int) -> Tensor:
        """Maps ``(batch, sequence, size)`` to ``(batch, words, hidden_size)``.

        ``word`` is ``(batch, sequence)`` int64, which of the ``words`` of its sequence each byte belongs to.
        """
        batch = len(encoded)
        key, value = (
            tensor.unflatten(-1, (-1, self.head)).float().flatten(0, 1)
            for tensor in self.projections(self.norm(encoded))
        )
        scores = (key * self.query.float().view(-1, self.head)).sum(-1) * self.head**-0.5
        place = (word + words * torch.arange(batch, device=word.device)[:, None]).flatten()
        highest = scores.new_full((batch * words, scores.shape[1]), float("-inf"))
        highest = highest.scatter_reduce(0, place[:, None].expand_as(scores), scores.detach(), "amax")
        weights = (scores - highest[place]).exp()
        total = torch.zeros_like(highest).index_add(0, place, weights)
        mixed = scores.new_zeros(*highest.shape, self.head).index_add(0, place, weights[..., None] * value)
        pooled = (mixed / total[..., None]).flatten(1).unflatten(0, (batch, words))
        return self.output(pooled.to(encoded.dtype))


class WordShift(nn.Module):
    """What is known before each word: what the layers made of the one before it, and a learned vector at first."""

    def __init__(self, size: int):
        super().__init__()
        self.first_word = empty_parameter(size)

    def forward(self, vectors: Tensor) -> Tensor:
        """Maps ``(batch, words, size)`` to the same shape."""
        first = self.first_word.to(vectors.dtype).expand(len(vectors), 1, -1)
        return torch.cat([first, vectors[:, :-1]], 1)


class WordReader(nn.Module):
    """``x_t + W_o (sigmoid(W_g norm(x_t)) * W_v norm(c_t))``."""

    def __init__(self, config: RecurrentConfig):
        super().__init__()
        norm, size = NORMS[config.norm], config.hierarchy["hidden_size"]
        self.byte_norm = norm(size, config.norm_epsilon)
        self.word_norm = norm(config.hidden_size, config.norm_epsilon)
        self.gate = Projections(size, {"gate": size})
        self.value = Projections(config.hidden_size, {"value": size})
        self.output = nn.Linear(size, size, bias=False)

    def forward(self, hidden: Tensor, known: Tensor) -> Tensor:
        """Maps ``(batch, sequence, size)`` to the same shape; ``known``: ``(batch, sequence, hidden_size)``."""
        (gate,) = self.gate(self.byte_norm(hidden))
        (value,) = self.value(self.word_norm(known))
        return hidden + self.output((torch.sigmoid(gate.float()) * value.float()).to(hidden.dtype))


class HATForCausalLM(RecurrentForCausalLM):
    """Embedding, encoder, layers over words, decoder, norm, head. Ids 0 to 255 are bytes; others are words alone."""

    def _make_further_modules(self) -> None:
        config, hierarchy = self.config, self.config.hierarchy
        size = hierarchy["hidden_size"]
        self.encoder = BlockStack(config, hierarchy["encoder"], size, has_norm=False)
        self.pooling = WordPooling(config)
        self.shift = WordShift(config.hidden_size)
        self.readers = nn.ModuleList(WordReader(config) for _ in hierarchy["decoder"])
        shared = shared_modules(config, [name for names in hierarchy["decoder"] for name in names], size)
        self.decoder_shared = shared
        self.decoder = nn.ModuleList(BlockStack(config, names, size, False, shared) for names in hierarchy["decoder"])

    @property
    def residual_streams(self) -> int:
        """Only what the head reads has the embedding's width and length."""
        return 1

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        word_starts: Tensor | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """One call on whole sequences; see :meth:`RecurrentForCausalLM.forward` for what is not said here.

        Args:
            past_key_values, use_cache: None and not True.
            word_starts: ``(batch, sequence)`` bool, where words start; a document begins with one, whatever it says.
                None: as :meth:`find_word_starts` finds them, which ``input_ids`` are needed for.

        Raises:
            ImportError: words are to be found, but ``hat-splitter`` is not installed.
            ValueError: a cache is asked for or given, or where words start is not known.
        """
        if use_cache or past_key_values is not None:
            raise ValueError(
                "this model keeps no cache, since a byte may change how the end of its text is cut into words; call "
                "it with use_cache=False and the whole text"
            )
        if word_starts is None:
            if input_ids is None:
                raise ValueError("words cannot be found in inputs_embeds; give word_starts, or input_ids instead")
            starts = document_starts(position_ids, len(input_ids), options)
            word_starts = self.find_word_starts(input_ids, attention_mask, starts)
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is not None and word_starts.shape != given.shape[:2]:
            raise ValueError(
                f"word_starts has the shape {tuple(word_starts.shape)}, but the sequences {tuple(given.shape[:2])}; "
                f"generate() finds words itself"
            )
        return super().forward(
            input_ids,
            attention_mask,
            position_ids,
            None,
            inputs_embeds,
            labels,
            use_cache=False,
            word_starts=word_starts.bool(),
            **options,
        )

    def find_word_starts(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, document_starts: Tensor | None = None
    ) -> Tensor:
        """Where words start in ``(batch, sequence)`` ids, bool of the same shape.

        A text ends where an id is no byte, ``attention_mask`` is 0, or, by ``document_starts``, another document
        begins. The last one of a sequence may end within a character, which is then cut as the highest that begins so.

        Raises:
            ImportError: ``hat-splitter`` is not installed.
        """
        hierarchy = self.config.hierarchy
        try:
            from hat_splitter import HATSplitter
        except ImportError as error:
            raise ImportError(
                f"this model reads where words start, and finds them with the package hat-splitter, which is not "
                f"installed: pip install hat-splitter=={hierarchy['hat_splitter']}, or give word_starts"
            ) from error
        splitter, longest = HATSplitter(), hierarchy["maximum_word_bytes"]
        is_byte = input_ids < 256
        if attention_mask is not None:
            is_byte = is_byte & attention_mask.bool()
        starts = torch.ones_like(is_byte)
        begins = torch.zeros_like(is_byte) if document_starts is None else document_starts
        rows = zip(input_ids.tolist(), is_byte.tolist(), begins.tolist(), strict=True)
        for row, (ids, flags, beginnings) in enumerate(rows):
            # What stands between ids that are no bytes, within a document.
            bounds = [(0, 0)]
            for place, (flag, begins_here) in enumerate(zip(flags, beginnings, strict=True)):
                if not flag:
                    bounds.append((place, place + 1))
                elif begins_here:
                    bounds.append((place, place))
            bounds.append((len(ids), len(ids)))
            for (_, begin), (end, _) in zip(bounds, bounds[1:], strict=False):
                text = bytes(ids[begin:end])
                completed = text + rest_of_character(text) if end == len(ids) else text
                found, place = torch.zeros(len(completed), dtype=torch.bool), 0
                for length in word_lengths(completed, splitter, longest):
                    found[place] = True
                    place += length
                starts[row, begin:end] = found[: len(text)].to(starts.device)
        return starts

    def _blocks(self, hidden: Tensor, states: States | None, word_starts: Tensor) -> tuple[list[Tensor], States]:
        starts = word_starts.clone()
        starts[:, 0] = True
        counts, word = starts.sum(1), starts.cumsum(1) - 1
        encoded, _, _ = self.encoder(hidden, None, "encoder")
        known = encoded.new_zeros(*encoded.shape[:2], self.config.hidden_size)
        # Sequences with equally many words together.
        for count in counts.unique().tolist():
            rows = (counts == count).nonzero()[:, 0]
            vectors = self.pooling(encoded[rows], word[rows], count)
            carried = initial_carried(vectors, self.layers)
            for block in self.layers:
                vectors, _, carried = block(vectors, None, carried)
            places = word[rows][..., None].expand(-1, -1, self.config.hidden_size)
            known = known.index_put((rows,), self.shift(vectors).gather(1, places))
        output, carried = encoded, None
        for index, (reader, blocks) in enumerate(zip(self.readers, self.decoder, strict=True)):
            output, carried, _ = blocks(reader(output, known), None, f"decoder.{index}", carried)
        return [hidden, output], []
