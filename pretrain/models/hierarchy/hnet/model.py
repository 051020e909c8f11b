"""H-Net: stages that choose their own chunks, round a decoder that sees nothing but those."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from data.packing import Batch
from pretrain.config.model import ModelConfig
from pretrain.models.carried import initial_carried
from pretrain.models.decoder import IGNORED_LABEL, Decoder
from pretrain.models.hierarchy.auxiliary import added, of_chunks
from pretrain.models.hierarchy.chunking import find_chunks, read_by_counts
from pretrain.models.hierarchy.hnet.dechunking import dechunk
from pretrain.models.hierarchy.hnet.ratio_loss import RatioLoss
from pretrain.models.hierarchy.hnet.stage import HNetStage
from pretrain.models.mixer import Carried, Documents, LayerContext, State
from pretrain.models.norm import NORMS
from pretrain.models.parameters import scale_learning_rate


class HNet(Decoder):
    """Dynamic chunking (Hwang et al. 2025, arXiv 2507.07955), for each stage from the outermost inwards::

        x  = norm(encoder(input))
        b  = router(x)                                     which positions begin a chunk, and how sure that is
        z  = inner([x_t where b_t; padding])               another stage, or norm(layers), whose width may be larger
        y  = STE(confidence_t) dechunk(z)_t + W x_t        the first channels of z, smoothed; W in float32, at first 0
        output = norm(decoder(y))

    The embedding, the outermost norm and the head are those of :class:`Decoder` at the outermost stage's width.
    Boundaries restart with each document, as every state does: packed documents are documents alone.

    In training the chunks of all sequences of a micro-batch stand in one row, without padding; see
    :class:`pretrain.models.hierarchy.chunking.Chunks`. Where states are kept, for generation, sequences that
    have equally many chunks in a call go through the inner network together.

    Every encoder, every decoder and ``layers`` are networks of their own: each has its router's GRU for itself, at its
    learning rate, and begins what its layers carry with zeros. :mod:`pretrain.models.hierarchy.auxiliary` says what
    becomes of their auxiliary losses.
    """

    def __init__(self, model: ModelConfig, megatron: TransformerConfig):
        super().__init__(model, megatron)
        config, depth = model.hierarchy, 0
        sizes = [stage.hidden_size for stage in config.stages] + [model.hidden_size]
        factors = [stage.learning_rate_factor for stage in config.stages] + [config.inner_learning_rate_factor]
        scale_learning_rate(self.parameters(), factors[0])
        for module in (self.layers, self.shared):
            scale_learning_rate(module.parameters(), factors[-1])
        # Each network begins what it carries by itself; nothing comes with the embeddings.
        self.inner_channels, self.carried_channels = self.carried_channels, {}
        self.inner_norm = NORMS[model.norm](model.hidden_size, model.norm_epsilon, False)
        scale_learning_rate(self.inner_norm.parameters(), factors[-1])
        self.stages = nn.ModuleList()
        for index, stage in enumerate(config.stages):
            place, further_in = f"hierarchy.stages.{index}", (sizes[index + 1], factors[index + 1])
            self.stages.append(HNetStage(stage, place, model, megatron, *further_in, depth, has_norm=index > 0))
            depth += len(stage.encoder) + len(stage.decoder)
        self.ratio_loss = RatioLoss([stage.target_ratio for stage in config.stages], config.ratio_loss_weight)

    def _context(self, layer: int) -> LayerContext:
        depth = sum(len(stage.encoder) + len(stage.decoder) for stage in self.model.hierarchy.stages)
        return LayerContext(self.model.hidden_size, depth + layer, depth + self.model.num_layers, self.config)

    def prepare_batch(self, called: nn.Module, micro_batches: Sequence[Batch], labels: float, train: bool) -> None:
        if not train:
            return
        counts = None
        if len(micro_batches) > 1:
            device = next(self.parameters()).device
            with torch.no_grad():
                counts = torch.stack(
                    [called(batch.tokens.to(device), None, batch.document_starts.to(device)) for batch in micro_batches]
                ).sum(0)
        self.ratio_loss.begin_batch(labels, counts)

    def take_metrics(self) -> dict[str, float | tuple[float, int]]:
        return super().take_metrics() | self.ratio_loss.take_metrics()

    def forward(self, tokens: Tensor, labels: Tensor | None, document_starts: Tensor) -> Tensor:
        """One micro-batch for training, as in :class:`Decoder`; the ratio loss adds to gradients alone.

        Without labels: how many positions each stage and the innermost network have, ``(stages + 1,)`` float64.
        """
        if labels is None:
            masks = self.boundaries(tokens, document_starts)
            chosen = [mask.sum(dtype=torch.float64) for mask in masks]
            return torch.stack([chosen[0].new_tensor(tokens.numel()), *chosen])
        self.ratio_loss.begin_micro_batch()
        loss = super().forward(tokens, labels, document_starts)
        if not torch.is_grad_enabled():
            return loss
        return self.ratio_loss.added_to(loss, (labels != IGNORED_LABEL).sum())

    def _blocks(
        self,
        hidden: Tensor,
        carried: Carried,
        states: dict[str, State] | None,
        documents: Documents | None,
        keep_states: bool,
    ) -> tuple[Tensor, Carried, dict[str, State]]:
        return self._from_stage(0, hidden, states, documents, keep_states)

    def _from_stage(
        self,
        index: int,
        hidden: Tensor,
        states: dict[str, State] | None,
        documents: Documents | None,
        keep_states: bool,
    ) -> tuple[Tensor, Carried, dict[str, State]]:
        """Stage ``index`` with all that stands further in; behind the last one that is the innermost network.

        What is carried comes out with the positions of ``hidden``; where states are kept, nothing does.
        """
        if index == len(self.stages):
            carried = initial_carried(hidden, self.inner_channels, documents)
            hidden, carried, final = super()._blocks(hidden, carried, states, documents, keep_states)
            return self.inner_norm(hidden), carried, final
        stage, name = self.stages[index], f"stages.{index}"
        starts = None if documents is None else documents.starts
        encoded, boundaries, of_encoder, final = stage.encode(hidden, states, documents, name)
        self.ratio_loss.record(index, boundaries)
        chunks = find_chunks(boundaries.chosen, starts, continues=states is not None)
        vectors = stage.widen(chunks.gather(encoded))
        if keep_states:
            further_in = None
            if states is not None:
                further_in = {key: state for key, state in states.items() if not key.startswith(f"{name}.")}
            vectors, inner_final = read_by_counts(
                lambda row, before, documents: self._from_stage(index + 1, row, before, documents, True)[::2],
                vectors,
                chunks.begins_document,
                chunks.counts,
                further_in,
            )
        else:
            row = chunks.row_of_documents(documents)
            vectors, of_inner, _ = self._from_stage(index + 1, vectors[:, None], None, row, False)
            vectors = vectors[:, 0]
        before = None if states is None else states[f"{name}.dechunk"]["average"]
        smoothed, average = dechunk(vectors[:, : stage.hidden_size], boundaries.probability, chunks, before)
        hidden, of_decoder, decoder_final = stage.decode(smoothed, encoded, boundaries, states, documents, name)
        if not keep_states:
            return hidden, added(of_encoder, of_chunks(of_inner, chunks.latest), of_decoder), {}
        return hidden, {}, final | inner_final | decoder_final | {f"{name}.dechunk": {"average": average}}

    def boundaries(self, tokens: Tensor, document_starts: Tensor | None) -> list[Tensor]:
        """Which positions of each stage begin a chunk, found by encoders and routers alone.

        Args:
            tokens: ``(batch, sequence)`` int64.
            document_starts: ``(batch, sequence)`` bool; None: one document per sequence, from its first token on.

        Returns:
            ``(batch, sequence)`` bool for the outermost stage; for each further one ``(1, chunks)`` over the chunks
            of the one before, in the order of :class:`Chunks`.
        """
        hidden = self._embed(tokens)
        documents, found = None if document_starts is None else Documents(document_starts), []
        for index, stage in enumerate(self.stages):
            encoded, boundaries, _, _ = stage.encode(hidden, None, documents, f"stages.{index}")
            found.append(boundaries.chosen)
            if len(found) == len(self.stages):
                break
            starts = None if documents is None else documents.starts
            chunks = find_chunks(boundaries.chosen, starts, continues=False)
            hidden = stage.widen(chunks.gather(encoded))[:, None]
            documents = chunks.row_of_documents(documents)
        return found

    def chunk_starts(self, tokens: Tensor, document_starts: Tensor | None = None) -> list[Tensor]:
        """Where chunks of each stage begin, ``(batch, sequence)`` bool over the tokens; arguments as above."""
        first, *further = self.boundaries(tokens, document_starts)
        row, position = first.nonzero(as_tuple=True)
        found = [first]
        for chosen in further:
            row, position = row[chosen[0]], position[chosen[0]]
            found.append(torch.zeros_like(first).index_put((row, position), torch.ones_like(row, dtype=torch.bool)))
        return found


MODEL = HNet
