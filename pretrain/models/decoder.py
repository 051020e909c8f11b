"""The decoder: embedding, blocks, norm and head; one pipeline stage of it, or all of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel import VocabParallelEmbedding, vocab_parallel_cross_entropy
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data.packing import Batch
from kernels.segments import ProcessSegments, Segments
from pretrain.config.model import ModelConfig
from pretrain.config.stages import layers_of_stages
from pretrain.models.block import Block, metric_reductions
from pretrain.models.carried import initial_carried, pack, packed_channels, unpack, with_auxiliary_loss
from pretrain.models.linear import ColumnParallelProjection, TiedProjection, UsesWeight, no_initialisation
from pretrain.models.mixer import Carried, Documents, LayerContext, MeasuredModule, State
from pretrain.models.mixer_config import AUXILIARY_LOSS
from pretrain.models.norm import NORMS
from pretrain.models.parameters import ParameterSpec, declare, padded_size, small_normal
from pretrain.models.segments import SegmentChain
from pretrain.models.sharing import share, shared_modules
from pretrain.models.states_between_steps import StatesBetweenSteps
from pretrain.models.vocabulary import Vocabulary, chunked_cross_entropy

IGNORED_LABEL = -100


class Decoder(nn.Module):
    """The part of the model that this rank's pipeline stage holds.

    Blocks are kept under their index in the whole model, so a parameter has the same name in every layout.
    ``config``, ``model_type`` and ``set_input_tensor`` are what Megatron-core's pipeline schedules ask for.

    Attributes:
        loss_chunk_size: positions whose logits are held at once where labels are compared with them; None: all.
        between_steps: states that rows of a step go on with in the next; None: every row begins anew.
        nats_of_rows: what :meth:`forward` returned last, before it was summed over rows: ``(batch,)`` float32, without
            gradient; on the last stage only.
    """

    nats_of_rows: Tensor

    def __init__(self, model: ModelConfig, megatron: TransformerConfig, stages: Sequence[range] | None = None):
        """Builds it, not yet filled.

        Args:
            stages: layers of each pipeline stage; None: the even split.
        """
        super().__init__()
        self.model, self.config = model, megatron
        self.model_type = ModelType.encoder_or_decoder
        self.is_first_stage = parallel_state.is_pipeline_first_stage()
        self.is_last_stage = parallel_state.is_pipeline_last_stage()
        self.input_tensor: Tensor | None = None
        self.compute_dtype = megatron.pipeline_dtype
        # Set where ranks hold segments of the same sequences: who hands on states, and who asks for them.
        self.chain: SegmentChain | None = None
        self.segments: Segments | None = None
        self.between_steps: StatesBetweenSteps | None = None
        self.loss_chunk_size: int | None = None

        # Rows behind the vocabulary, where it does not divide over the ranks, are zero and never likely.
        vocabulary = padded_size(model.vocab_size)
        rows = vocabulary // parallel_state.get_tensor_model_parallel_world_size()
        self.vocabulary = Vocabulary.of_this_rank(model.vocab_size, rows, model.output_logit_soft_cap)
        stages = stages or layers_of_stages(model.num_layers, parallel_state.get_pipeline_model_parallel_world_size())
        layers = stages[parallel_state.get_pipeline_model_parallel_rank()]
        # A head that is tied to the embedding needs it on its own stage too.
        if self.is_first_stage or (self.is_last_stage and model.tie_embeddings):
            self.embedding = VocabParallelEmbedding(
                vocabulary,
                model.embedding_size,
                init_method=no_initialisation,
                reduce_scatter_embeddings=megatron.sequence_parallel,
                config=megatron,
            )
            spec = ParameterSpec(
                small_normal(model.embedding_size),
                shard_dimension=0,
                split_size=model.vocab_size,
                weight_decay=False,
                pipeline_copy=not self.is_first_stage,
            )
            declare(self.embedding.weight, spec)
        # Names in one order on all stages, which pass these tensors to each other as one.
        self.carried_channels = model.carried_channels()
        self.shared = nn.ModuleDict(self._shared_modules(layers.start))
        self.layers = nn.ModuleDict()
        for layer in layers:
            self.layers[str(layer)] = Block(model.block(layer), model, self._context(layer))
        share(self.layers.values(), self.shared)
        if self.is_last_stage:
            norm = NORMS[model.norm]
            self.output_norm = norm(model.embedding_size, model.norm_epsilon, megatron.sequence_parallel)
        if self.is_last_stage and model.tie_embeddings:
            self.tied_head = TiedProjection(model.embedding_size, vocabulary, megatron)
        elif self.is_last_stage:
            head = ParameterSpec(small_normal(model.embedding_size), shard_dimension=0, split_size=model.vocab_size)
            self.head = ColumnParallelProjection(model.embedding_size, vocabulary, head, megatron)

    def hold_segments(self, scheme: str) -> None:
        """Makes this rank's sequences segments of whole ones, which the ranks of its context-parallel group hold.

        Args:
            scheme: ``chain``: every layer waits for the state of the rank before; ``gather`` or ``scan``: layers whose
                mixers exchange what is before them do that (:class:`kernels.segments.Segments`), and only others wait.
        """
        self.chain = SegmentChain()
        if scheme != "chain":
            self.segments = ProcessSegments(parallel_state.get_context_parallel_group(), scheme)

    def _context(self, layer: int) -> LayerContext:
        """Where a layer of ``model.layers`` stands."""
        return LayerContext(self.model.hidden_size, layer, self.model.num_layers, self.config)

    def prepare_batch(self, called: nn.Module, micro_batches: Sequence[Batch], labels: float, train: bool) -> None:
        """Called before the micro-batches of each global batch, on every rank.

        Args:
            called: what the schedule calls instead of this module: itself, or an engine round it.
            micro_batches: this rank's.
            labels: how many labels of the global batch count, or 1 if none does: the schedule divides
                gradients by it.
            train: whether gradients are wanted.
        """
        if self.between_steps is not None:
            self.between_steps.begin(train)

    def _shared_modules(self, first: int) -> dict[str, nn.Module]:
        """What layers anywhere in the model share; every stage holds a copy, of which the first stage's counts."""
        modules = shared_modules(self.model.blocks_in_use(), self._context(first))
        for module in modules.values():
            for parameter in module.parameters():
                copy = replace(parameter.spec, on_every_stage=True, pipeline_copy=not self.is_first_stage)
                declare(parameter, copy)
        return modules

    def take_metrics(self) -> dict[str, float | tuple[float, int]]:
        """Figures that the mixers of this rank's layers report, by name; a name that none reports is 0.

        Of one that is averaged over layers, the sum of the values and their number.
        """
        reductions = metric_reductions(self.model)
        values: dict[str, list[float]] = {name: [] for name in reductions}
        for module in self.modules():
            if isinstance(module, MeasuredModule):
                for name, value in module.take_metrics().items():
                    values[name].append(value)
        found: dict[str, float | tuple[float, int]] = {}
        for name, reduction in reductions.items():
            combined = max([0.0, *values[name]]) if reduction == "max" else sum(values[name])
            found[name] = (combined, len(values[name])) if reduction == "mean" else combined
        return found

    def logits_and_outputs(
        self, tokens: Tensor, documents: Documents, layers: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits of sequences that begin here, and the residual stream behind some layers, of one pipeline stage.

        Args:
            tokens: ``(batch, sequence)`` int64.
            layers: indices in the whole model, as text.

        Returns:
            This rank's part of the vocabulary, ``(sequence, batch, vocabulary / ranks)`` float32; and by layer
            ``(sequence, batch, hidden_size)``, under sequence parallelism this rank's part of the sequence.
        """
        hidden = self._embed(tokens)
        outputs: dict[str, Tensor] = dict.fromkeys(layers)
        carried = initial_carried(hidden, self.carried_channels)
        hidden, _, _ = self._blocks(hidden, carried, None, documents, keep_states=False, outputs=outputs)
        return self._head(hidden), outputs

    def take_loss_terms(self, labels: int) -> dict[str, float]:
        """Terms of the loss beside the labels' cross-entropy, each a mean over ``labels`` of a global batch.

        Every rank calls it after each training step; none, unless a subclass adds some.
        """
        return {}

    @property
    def packed_channels(self) -> int:
        """Channels behind the hidden states' own of the tensor that one pipeline stage sends to the next."""
        return packed_channels(self.carried_channels, self.compute_dtype)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Takes the hidden states of the stage before; called by the pipeline schedule."""
        self.input_tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def _embed(self, tokens: Tensor) -> Tensor:
        # The sequence comes first from here on; under sequence parallelism the embedding itself sees to that.
        tokens = tokens if self.config.sequence_parallel else tokens.t()
        return self.embedding(tokens).to(self.compute_dtype)

    def _project(self, hidden: Tensor, *instead: UsesWeight) -> Tensor:
        """The head's product, or what is made instead of the normed hidden states and the head's weight."""
        hidden = self.output_norm(hidden)
        if self.model.tie_embeddings:
            return self.tied_head(hidden, self.embedding.weight, *instead)
        return self.head(hidden, *instead)

    def _begin(self, tokens: Tensor) -> tuple[Tensor, Carried]:
        """What this stage's first layer reads: embeddings, or what the stage before has sent."""
        if not self.is_first_stage:
            return unpack(self.input_tensor, self.carried_channels)
        hidden = self._embed(tokens)
        return hidden, initial_carried(hidden, self.carried_channels)

    def _head(self, hidden: Tensor) -> Tensor:
        """Logits of this rank's part of the vocabulary, ``(sequence, batch, vocabulary / ranks)``, float32."""
        return self.vocabulary.logits(self._project(hidden))

    def _nats(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of each label, ``(sequence, batch)`` float32; labels likewise, each a token."""
        if self.loss_chunk_size is None:
            return vocab_parallel_cross_entropy(self._head(hidden), labels)
        by_chunks = partial(
            chunked_cross_entropy,
            labels=labels,
            vocabulary=self.vocabulary,
            chunk_size=self.loss_chunk_size,
            sequence_parallel=self.config.sequence_parallel,
        )
        return self._project(hidden, by_chunks)

    def _blocks(
        self,
        hidden: Tensor,
        carried: Carried,
        states: dict[str, State] | None,
        documents: Documents | None,
        keep_states: bool,
        outputs: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, Carried, dict[str, State]]:
        """All layers of this stage; ``outputs``, where given, takes the residual stream behind each of its keys."""
        final = {}
        for layer, block in self.layers.items():
            state = None if states is None else states.get(layer)
            passes_on = self.chain is not None and block.mixer is not None
            if passes_on and self.segments is not None and block.mixer.config.exchanges_segments:
                state, passes_on = self.segments, False
            elif passes_on:
                # Outside of what is recomputed: a message is sent once.
                state = self.chain.receive_state(block.mixer, hidden)
            if self.config.recompute_granularity is not None and torch.is_grad_enabled():
                hidden, state, carried = checkpoint(block, hidden, state, documents, carried, use_reentrant=False)
            else:
                hidden, state, carried = block(hidden, state, documents, carried)
            if passes_on:
                hidden = self.chain.send_state(block.mixer, hidden, state)
            if keep_states and state is not None:
                final[layer] = state
            if outputs is not None and layer in outputs:
                outputs[layer] = hidden
        return hidden, carried, final

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """What the schedule hands to :meth:`forward` of a batch on this rank's device."""
        return batch.tokens, batch.labels, batch.document_starts

    def forward(
        self, tokens: Tensor, labels: Tensor, document_starts: Tensor, word_starts: Tensor | None = None
    ) -> Tensor:
        """One micro-batch for training.

        Args:
            tokens, labels: ``(batch, sequence)`` int64; labels hold ``IGNORED_LABEL`` where nothing counts.
            document_starts: ``(batch, sequence)`` bool, True at each document's first token.
            word_starts: likewise of each word; None unless the model reads words.

        Returns:
            On the last stage the summed cross-entropy of the labels that count, in nats, a float32 scalar, whose
            gradient is that of the sum with the mixers' auxiliary losses at the tokens of those labels;
            on the others hidden states, and what is carried with them, for the next.
        """
        hidden, carried = self._begin(tokens)
        documents = Documents(document_starts, word_starts)
        if self.between_steps is None:
            hidden, carried, _ = self._blocks(hidden, carried, None, documents, keep_states=False)
        else:
            before = self.between_steps.before_next()
            hidden, carried, final = self._blocks(hidden, carried, before, documents, keep_states=True)
            self.between_steps.take(final)
        if not self.is_last_stage:
            return pack(hidden, carried)
        counts = labels != IGNORED_LABEL
        nats = self._nats(hidden, labels.where(counts, 0).t().contiguous()) * counts.t()
        self.nats_of_rows, loss = nats.detach().sum(0), nats.sum()
        if AUXILIARY_LOSS not in carried:
            return loss
        auxiliary = carried[AUXILIARY_LOSS].squeeze(-1)
        own = counts.t()
        if self.config.sequence_parallel:
            own = own.chunk(self.config.tensor_model_parallel_size)[parallel_state.get_tensor_model_parallel_rank()]
        return with_auxiliary_loss(loss, (auxiliary * own).sum())

    def logits(
        self,
        tokens: Tensor,
        states: dict[str, State] | None = None,
        document_starts: Tensor | None = None,
        word_starts: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, State]]:
        """Logits and the state after them, of whole sequences.

        Args:
            tokens: ``(batch, sequence)`` int64.
            states: as returned by an earlier call; None at the beginning.
            document_starts: as in :meth:`forward`; None: no document begins within this call.
            word_starts: as in :meth:`forward`; None unless the model reads words.

        Returns:
            ``(batch, sequence, vocabulary / ranks)`` float32, this rank's part of the vocabulary; on pipeline stages
            before the last what :meth:`set_input_tensor` of the next one takes. And the state of each layer that is
            here.

        Raises:
            InputError: the model reads words, and ``word_starts`` is None.
        """
        if document_starts is None and word_starts is not None:
            document_starts = torch.zeros_like(word_starts)
        documents = None if document_starts is None else Documents(document_starts, word_starts)
        hidden, carried = self._begin(tokens)
        hidden, carried, final = self._blocks(hidden, carried, states, documents, keep_states=True)
        if not self.is_last_stage:
            return pack(hidden, carried), final
        return self._head(hidden).transpose(0, 1), final
