"""mLSTM in Hugging Face's form: native names and fields by ``model_type``, settings of ``modeling.py``."""

from __future__ import annotations

from pretrain.models.hugging_face import renamed_section
from pretrain.models.mlstm.config import MLSTMConfig

# Our name within the mixer -> the name within a block of the native class.
KEYS = {
    "xlstm": {
        "projections.query_weight": "mlstm_layer.q.weight",
        "projections.key_weight": "mlstm_layer.k.weight",
        "projections.value_weight": "mlstm_layer.v.weight",
        "projections.output_gate_weight": "mlstm_layer.ogate_preact.weight",
        "projections.input_gate_weight": "mlstm_layer.igate_preact.weight",
        "projections.forget_gate_weight": "mlstm_layer.fgate_preact.weight",
        "input_gate_bias": "mlstm_layer.igate_preact.bias",
        "forget_gate_bias": "mlstm_layer.fgate_preact.bias",
        "norm_weight": "mlstm_layer.multihead_norm.weight",
        "output.weight": "mlstm_layer.out_proj.weight",
    }
}


# Our keys -> ``xLSTMConfig``'s fields; its layers take ``int(hidden_size * factor)`` channels, as ours do.
_FIELD_NAMES = {
    "num_heads": "num_heads",
    "query_key_factor": "qk_dim_factor",
    "value_factor": "v_dim_factor",
    "gate_soft_cap": "gate_soft_cap",
    "norm_epsilon": "norm_eps",
    "cell_epsilon": "eps",
}


def _xlstm_fields(config: MLSTMConfig, hidden_size: int) -> dict[str, object]:
    return {theirs: getattr(config, ours) for ours, theirs in _FIELD_NAMES.items()}


FIELDS = {"xlstm": _xlstm_fields}
SECTIONS = {"xlstm": renamed_section("mlstm", _FIELD_NAMES)}


def settings(config: MLSTMConfig, hidden_size: int) -> dict[str, object]:
    return {
        "num_heads": config.num_heads,
        "query_key_size": config.query_key_size(hidden_size),
        "value_size": config.value_size(hidden_size),
        "gate_soft_cap": config.gate_soft_cap,
        "norm_epsilon": config.norm_epsilon,
        "cell_epsilon": config.cell_epsilon,
        "chunk_size": config.chunk_size,
    }
