"""HAT: bytes round a decoder that sees one vector a word."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from data.batch import Batch
from pretrain.config.model import ModelConfig
from pretrain.errors import InputError
from pretrain.models.carried import initial_carried
from pretrain.models.decoder import Decoder
from pretrain.models.hierarchy.auxiliary import added, of_chunks
from pretrain.models.hierarchy.blocks import BlockStack
from pretrain.models.hierarchy.chunking import find_chunks, read_by_counts
from pretrain.models.hierarchy.hat.open_words import find_words, known_before, open_word_state
from pretrain.models.hierarchy.hat.words import WordPooling, WordReader, WordShift, WordSums
from pretrain.models.mixer import Carried, Documents, LayerContext, State
from pretrain.models.sharing import shared_modules


class HAT(Decoder):
    """The hierarchical autoregressive transformer (Neitemeier et al. 2025, arXiv 2501.10322), as released models do::

        e_t = encoder(input)                        over all bytes, not word by word
        w_j = pooled e_t of the bytes t of word j
        u_j = layers(w)_j                           over words
        c_j = u_{j-1}, or a learned vector for the first word of each document
        output_t = norm(decoder(e, c)_t)            bytes read c_word(t) before each block, or before the first

    The embedding, the last norm and the head are those of :class:`Decoder` at the bytes' width. A word's vector
    reaches only the bytes of later words, so a byte is predicted from bytes before it alone. Packed documents are
    documents alone. The words of all sequences of a micro-batch stand in one row, without padding; see
    :class:`pretrain.models.hierarchy.chunking.Chunks`.

    Encoder, ``layers`` and decoder are networks of their own: each has its router's GRU for itself, and begins what its
    layers carry with zeros; in the decoder that passes where words are read. What becomes of their auxiliary losses,
    :mod:`pretrain.models.hierarchy.auxiliary` says; a byte is part of the word that it stands in.
    """

    def __init__(self, model: ModelConfig, megatron: TransformerConfig):
        super().__init__(model, megatron)
        config = model.hierarchy
        size, encoders, decoders = config.hidden_size, len(config.encoder), len(config.decoder)
        total = encoders + decoders
        place = "hierarchy.encoder"
        self.encoder = BlockStack(config.encoder, size, model, megatron, (0, total), False, place)
        self.pooling = WordPooling(size, config.num_heads, model, megatron)
        self.shift = WordShift(model.hidden_size)
        parts = [config.decoder] if config.read_words == "first" else [[name] for name in config.decoder]
        self.readers = nn.ModuleList(WordReader(size, total, model, megatron) for _ in parts)
        context = LayerContext(size, encoders, total, megatron)
        blocks = [model.blocks[name] for name in config.decoder]
        shared = self.decoder_shared = nn.ModuleDict(shared_modules(blocks, context))
        place = "hierarchy.decoder"
        self.decoder = nn.ModuleList(
            BlockStack(names, size, model, megatron, (encoders + index, total), False, place, shared)
            for index, names in enumerate(parts)
        )
        # Each network begins what it carries by itself; nothing comes with the embeddings.
        self.inner_channels, self.carried_channels = self.carried_channels, {}
        # Bytes and words since figures were last taken.
        self.counted: list[Tensor] = []

    def _context(self, layer: int) -> LayerContext:
        config = self.model.hierarchy
        depth = len(config.encoder) + len(config.decoder)
        return LayerContext(self.model.hidden_size, depth + layer, depth + self.model.num_layers, self.config)

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        if batch.word_starts is None:
            raise InputError(
                "model.hierarchy.type=hat reads where words start, but the data's tokenizer knows no words; set "
                "data.tokenizer.type to hierarchical_bytes"
            )
        return (*super().inputs(batch), batch.word_starts)

    def take_metrics(self) -> dict[str, float | tuple[float, int]]:
        """Counts of all data-parallel ranks together, so every rank must ask."""
        counts = torch.zeros(2, dtype=torch.float64, device=next(self.parameters()).device)
        for counted in self.counted:
            counts += counted
        self.counted = []
        dist.all_reduce(counts, group=parallel_state.get_data_parallel_group())
        size, words = counts.tolist()
        return super().take_metrics() | {"bytes_per_word": size / max(words, 1.0)}

    def _blocks(
        self,
        hidden: Tensor,
        carried: Carried,
        states: dict[str, State] | None,
        documents: Documents | None,
        keep_states: bool,
    ) -> tuple[Tensor, Carried, dict[str, State]]:
        if documents is None or documents.word_starts is None:
            raise InputError(
                "a model of type hat reads where words start, but was given tokens alone; give word_starts, as "
                "data.tokenizer.type=hierarchical_bytes finds them"
            )
        if keep_states:
            hidden, final = self._continue(hidden, states, documents)
            return hidden, {}, final
        starts = documents.starts
        words = find_chunks(documents.word_starts | starts, starts, continues=False)
        count = len(words.row)
        if torch.is_grad_enabled():
            self.counted.append(torch.tensor([starts.numel(), count], dtype=torch.float64, device=starts.device))
        encoded, of_encoder, _ = self.encoder(hidden, None, documents, "encoder")
        row = words.row_of_documents(documents)
        vectors, of_words, _ = self._backbone(self.pooling(encoded, words.latest, count), None, row, False)
        vectors = self.shift(vectors, row.starts[0])
        hidden, of_decoder, _ = self._decode(encoded, vectors, words.latest, None, documents)
        return hidden, added(of_encoder, of_chunks(of_words, words.latest), of_decoder), {}

    def _continue(
        self, hidden: Tensor, states: dict[str, State] | None, documents: Documents
    ) -> tuple[Tensor, dict[str, State]]:
        """One call of a text that is read in pieces: a word enters the backbone where the next one starts.

        Beside those of blocks there is one state, ``open_word``: what the bytes of the last word, which may go on, add
        up to so far, and what they may know of the words before it. Sequences in which equally many words end go
        through the backbone together.
        """
        opened = None if states is None else states["open_word"]
        begins = None if opened is None else opened["begins_document"] > 0
        row = find_words(documents.word_starts, documents.starts, begins)
        encoded, _, final = self.encoder(hidden, states, documents, "encoder")
        earlier = None
        if opened is not None:
            earlier = (row.first, WordSums(opened["highest"], opened["total"], opened["mixed"]))
        sums = self.pooling.sums(encoded, row.word, row.words, earlier)
        vectors = self.pooling.vectors(sums[row.ended], encoded.dtype)[:, 0]
        # Every state is there from the beginning, although no word has ended yet.
        before = self._backbone_start(len(row.counts), hidden.device) if states is None else states
        before = {layer: before[layer] for layer in self.layers if layer in before}
        read, after = read_by_counts(
            lambda vectors, states, documents: self._backbone(vectors, states, documents, True)[::2],
            vectors,
            row.begins_document[row.ended],
            row.counts,
            before,
        )
        known = known_before(row, read, self.shift.first_word, None if opened is None else opened["known"])
        final |= after | {"open_word": open_word_state(row, sums, known)}
        hidden, _, decoder_final = self._decode(encoded, known[:, None], row.word, states, documents)
        return hidden, final | decoder_final

    def _decode(
        self, hidden: Tensor, vectors: Tensor, word: Tensor, states: dict[str, State] | None, documents: Documents
    ) -> tuple[Tensor, Carried, dict[str, State]]:
        """The decoder's output, what its layers carry, and its states, from bytes that read what they may of words."""
        carried, final = None, {}
        for index, (reader, blocks) in enumerate(zip(self.readers, self.decoder, strict=True)):
            hidden = reader(hidden, vectors, word)
            hidden, carried, part = blocks(hidden, states, documents, f"decoder.{index}", carried)
            final |= part
        return hidden, carried, final

    def _backbone(
        self, vectors: Tensor, states: dict[str, State] | None, documents: Documents, keep_states: bool
    ) -> tuple[Tensor, Carried, dict[str, State]]:
        carried = initial_carried(vectors, self.inner_channels, documents)
        return super()._blocks(vectors, carried, states, documents, keep_states)

    def _backbone_start(self, batch: int, device: torch.device) -> dict[str, State]:
        blocks = {layer: block for layer, block in self.layers.items() if block.mixer is not None}
        return {layer: block.mixer.initial_state(batch, device) for layer, block in blocks.items()}

    def chunk_starts(self, tokens: Tensor, document_starts: Tensor | None = None) -> list[Tensor]:
        """Refused: words are the tokenizer's, not the model's choice."""
        raise InputError("a model of type hat forms no chunks of its own; its words are those of data.tokenizer")


MODEL = HAT
