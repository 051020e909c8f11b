"""From bytes to one vector a word, and from what is known of earlier words back to bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from pretrain.config.model import ModelConfig
from pretrain.models.linear import ColumnParallelProjections, Projection, RowParallelProjection
from pretrain.models.norm import NORMS
from pretrain.models.parameters import ParameterSpec, constant, new_parameter, normal, small_normal, wang_normal


@dataclass(frozen=True)
class WordSums:
    """What the bytes of each word that were read so far add up to, of which its pooled vector is a quotient; float32.

    Attributes:
        highest: ``(words, heads)``, the largest score; the sums are of ``exp(score - highest)``.
        total: ``(words, heads)``, the sum of the weights.
        mixed: ``(words, heads, size)``, the weighted sum of the values.
    """

    highest: Tensor
    total: Tensor
    mixed: Tensor

    def __getitem__(self, words: Tensor) -> WordSums:
        return WordSums(self.highest[words], self.total[words], self.mixed[words])

    @property
    def pooled(self) -> Tensor:
        """``(words, heads, size)``, the mean of the values by their weights."""
        return self.mixed / self.total[..., None]


def sum_words(
    scores: Tensor, values: Tensor, word: Tensor, words: int, earlier: tuple[Tensor, WordSums] | None = None
) -> WordSums:
    """Softmax attention of one query per word over the bytes of that word alone, in float32, but for the division.

    Memory is linear in the bytes: there is neither padding nor a mask.

    Args:
        scores: ``(bytes, heads)`` float32.
        values: ``(bytes, heads, size)``.
        word: ``(bytes,)`` int64, the word that each byte belongs to.
        words: their number. The sums of a word without bytes mean nothing.
        earlier: words, ``(some,)`` int64, that have bytes beside these, and the sums of those bytes.
    """
    # A shift changes nothing but rounding, so no gradient goes through it.
    index = word[:, None].expand_as(scores)
    highest = scores.new_full((words, scores.shape[1]), float("-inf"))
    if earlier is not None:
        highest[earlier[0]] = earlier[1].highest.detach()
    highest = highest.scatter_reduce(0, index, scores.detach(), "amax")
    weights = (scores - highest[word]).exp()
    total = scores.new_zeros(words, scores.shape[1]).index_add(0, word, weights)
    mixed = scores.new_zeros(words, *values.shape[1:]).index_add(0, word, weights[..., None] * values.float())
    if earlier is not None:
        begun, sums = earlier
        scale = (sums.highest.detach() - highest[begun]).exp()
        total = total.index_add(0, begun, sums.total * scale)
        mixed = mixed.index_add(0, begun, sums.mixed * scale[..., None])
    return WordSums(highest, total, mixed)


class WordPooling(nn.Module):
    """``w_j = W_o concat_h softmax_t(q_h . k_t,h / sqrt(size)) v_t,h`` over the bytes t of word j.

    The query is learned and the same for every word; keys and values come from the norm of the bytes' vectors. The
    bytes' order reaches the word through their vectors, which know what stands before them. Heads are split over
    tensor-parallel ranks.
    """

    def __init__(self, hidden_size: int, num_heads: int, model: ModelConfig, megatron: TransformerConfig):
        super().__init__()
        self.head = hidden_size // num_heads
        self.norm = NORMS[model.norm](hidden_size, model.norm_epsilon, False)
        split = ParameterSpec(small_normal(hidden_size), shard_dimension=0)
        self.query = new_parameter((hidden_size,), ParameterSpec(normal(1.0), shard_dimension=0, weight_decay=False))
        self.projections = ColumnParallelProjections(
            hidden_size, {name: Projection(hidden_size, split) for name in ("key", "value")}, megatron
        )
        back = ParameterSpec(small_normal(hidden_size), shard_dimension=1)
        self.output = RowParallelProjection(hidden_size, model.hidden_size, back, megatron)

    def forward(self, encoded: Tensor, word: Tensor, words: int) -> Tensor:
        """Maps ``(sequence, batch, hidden_size)`` to ``(words, 1, model.hidden_size)``.

        Args:
            encoded: the bytes' vectors.
            word: ``(batch, sequence)`` int64, the word that each byte belongs to.
            words: their number.
        """
        return self.vectors(self.sums(encoded, word, words), encoded.dtype)

    def sums(
        self, encoded: Tensor, word: Tensor, words: int, earlier: tuple[Tensor, WordSums] | None = None
    ) -> WordSums:
        """Those of the words so far; arguments as of :meth:`forward` and :func:`sum_words`."""
        key, value = (
            tensor.transpose(0, 1).flatten(0, 1).unflatten(-1, (-1, self.head))
            for tensor in self.projections(self.norm(encoded))
        )
        scores = (key.float() * self.query.view(-1, self.head)).sum(-1) * self.head**-0.5
        return sum_words(scores, value, word.flatten(), words, earlier)

    def vectors(self, sums: WordSums, dtype: torch.dtype) -> Tensor:
        """``(words, 1, model.hidden_size)`` of words that are complete."""
        return self.output(sums.pooled.flatten(1)[:, None].to(dtype))


class WordShift(nn.Module):
    """What bytes may know of words: ``c_j = u_{j-1}``, and a learned vector for the first word of each document."""

    def __init__(self, size: int):
        super().__init__()
        self.first_word = new_parameter((size,), ParameterSpec(constant(0.0), weight_decay=False))

    def forward(self, vectors: Tensor, begins_document: Tensor) -> Tensor:
        """Maps the backbone's ``(words, 1, size)`` to the same shape.

        ``begins_document``: ``(words,)`` bool, the first word of each document.
        """
        first = self.first_word.to(vectors.dtype)
        # The very first word begins a document, so that what comes round from the end is not read.
        return torch.where(begins_document[:, None, None], first, vectors.roll(1, 0))


class WordReader(nn.Module):
    """``x_t + W_o (sigmoid(W_g norm(x_t)) * W_v norm(c_word(t)))``.

    Cross-attention of a byte to its one word weighs that word by 1, whatever the query; a gate takes the query's place
    here. The word's part is computed once a word. Channels are split over tensor-parallel ranks.
    """

    def __init__(self, hidden_size: int, num_blocks: int, model: ModelConfig, megatron: TransformerConfig):
        super().__init__()
        norm = NORMS[model.norm]
        self.byte_norm = norm(hidden_size, model.norm_epsilon, False)
        self.word_norm = norm(model.hidden_size, model.norm_epsilon, False)
        gate = ParameterSpec(small_normal(hidden_size), shard_dimension=0)
        value = ParameterSpec(small_normal(model.hidden_size), shard_dimension=0)
        back = ParameterSpec(wang_normal(hidden_size, num_blocks), shard_dimension=1)
        self.gate = ColumnParallelProjections(hidden_size, {"gate": Projection(hidden_size, gate)}, megatron)
        self.value = ColumnParallelProjections(model.hidden_size, {"value": Projection(hidden_size, value)}, megatron)
        self.output = RowParallelProjection(hidden_size, hidden_size, back, megatron)

    def forward(self, hidden: Tensor, vectors: Tensor, word: Tensor) -> Tensor:
        """Maps ``(sequence, batch, hidden_size)`` to the same shape.

        Args:
            hidden: the bytes' vectors.
            vectors: ``(words, 1, model.hidden_size)``, what is known before each word.
            word: ``(batch, sequence)`` int64, the word that each byte belongs to.
        """
        (gate,) = self.gate(self.byte_norm(hidden))
        (value,) = self.value(self.word_norm(vectors))
        read = torch.sigmoid(gate.float()) * value[:, 0][word.t()].float()
        return hidden + self.output(read.to(hidden.dtype))
