"""Configuration of ``RecurrentForCausalLM``."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class RecurrentConfig(PretrainedConfig):
    """A decoder of residual blocks, each with a mixer along the sequence, a channel mixer, or both.

    Args:
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        layers: name of each layer's block.
        blocks: name -> ``{"mixer": {...}, "channel": {...}}``, either of which may be absent; its ``type`` names the
            class in ``mixers.py``, and what remains are the keyword arguments of that class.
        norm: ``rms`` or ``layer``.
        norm_epsilon: of the norms before mixers and before the head.
        output_logit_soft_cap: logits are capped to +-this by ``c * tanh(x / c)``; None leaves them.
        use_cache: whether evaluation returns the states after the last token.
        initializer_range: standard deviation of matrices that are not loaded. The models were trained from another
            start, layer by layer; begin a new training there rather than here.
        embedding_size: width of the embedding and the head; None: ``hidden_size``.
        hierarchy: stages round the layers, ``{"type": "hnet", "stages": [{"hidden_size": ..., "encoder": [...],
            "decoder": [...]}]}`` from the outermost inwards, each part a list of names in ``blocks``; or ``{"type":
            "hat", "hidden_size": ..., "encoder": [...], "decoder": [[...], ...], "num_heads": ...,
            "maximum_word_bytes": ..., "hat_splitter": "the version that cut words in training"}``, before each of the
            decoder's lists of which bytes read their words; None: none.
    """

    model_type = "recurrent_decoder"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size: int = 256,
        hidden_size: int = 64,
        layers: list[str] | None = None,
        blocks: dict[str, dict[str, dict[str, Any]]] | None = None,
        norm: str = "rms",
        norm_epsilon: float = 1e-6,
        output_logit_soft_cap: float | None = None,
        use_cache: bool = True,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = False,
        embedding_size: int | None = None,
        hierarchy: dict[str, Any] | None = None,
        **fields: Any,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.layers = layers or []
        self.blocks = blocks or {}
        self.num_hidden_layers = len(self.layers)
        self.embedding_size = hidden_size if embedding_size is None else embedding_size
        self.hierarchy = hierarchy
        self.norm = norm
        self.norm_epsilon = norm_epsilon
        self.output_logit_soft_cap = output_logit_soft_cap
        self.use_cache = use_cache
        self.initializer_range = initializer_range
        fields.pop("num_hidden_layers", None)
        super().__init__(tie_word_embeddings=tie_word_embeddings, **fields)
