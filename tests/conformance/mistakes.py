"""The README's mixer with one mistake each, so that every check is seen to fail."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mistake:
    """One change to the README's code.

    Attributes:
        check: the function of ``checks`` or ``declarations`` that must notice, or ``tensor_parallel`` or
            ``sequence_parallel``.
        replacements: old code -> new code.
    """

    check: str
    replacements: dict[str, str]


_LEVEL = 'level, decay, levels = state["level"],'
_START = "state = self.initial_state(inputs.shape[1], inputs.device) if state is None else state"
_LOOP = "enumerate(inputs.float())"
_UPDATE = "level = decay * level +"
_RESET = "level = level.masked_fill(documents.starts[:, position, None], 0.0)"
_RETURNED = '{"level": level}'
_KEYS = "KEYS: dict[str, dict[str, str]] = {}"
_FIELDS = "FIELDS: dict[str, object] = {}"

MISTAKES: dict[str, Mistake] = {
    "ignores_state": Mistake("cutting", {_LEVEL: 'level, decay, levels = torch.zeros_like(state["level"]),'}),
    "detaches_state": Mistake("cutting", {_LEVEL: 'level, decay, levels = state["level"].detach(),'}),
    "forgets_within_a_call": Mistake("cutting", {_UPDATE: 'level = decay * state["level"] +'}),
    "depends_on_length": Mistake("cutting", {_LOOP: "enumerate(inputs.float() / inputs.shape[0])"}),
    "differs_when_decoding": Mistake("cutting", {_LOOP: "enumerate(inputs.float() * (1 + torch.is_grad_enabled()))"}),
    "looks_ahead": Mistake("causality", {_LOOP: "enumerate(inputs.float() + inputs.float().roll(-1, 0))"}),
    "mixes_the_batch": Mistake("causality", {_LOOP: "enumerate(inputs.float() + inputs.float().mean(1, True))"}),
    "remembers_nothing": Mistake("causality", {_UPDATE: "level = 0 * decay * level +"}),
    "ignores_documents": Mistake("documents", {_RESET: "level = level"}),
    "ignores_a_first_document": Mistake("documents", {"if documents is not None:": "if documents and position:"}),
    "leaks_some_state": Mistake("documents", {_RESET: _RESET.replace("0.0", "1e-2")}),
    "cuts_all_gradients_at_a_start": Mistake(
        "documents",
        {_RESET: _RESET.replace("level.", "(level.detach() if documents.starts[:, position].any() else level).", 1)},
    ),
    "returns_another_dtype": Mistake("state", {_RETURNED: '{"level": level.double()}'}),
    "returns_another_name": Mistake("state", {_RETURNED: '{"levels": level}'}),
    "returns_another_shape": Mistake("state", {_RETURNED: '{"level": level[None]}'}),
    "starts_from_ones": Mistake(
        "state",
        {_START: 'state = {"level": torch.ones_like(inputs[0], dtype=torch.float32)} if state is None else state'},
    ),
    "cuts_a_gradient": Mistake(
        "slopes", {"torch.sigmoid(self.decay)": "torch.sigmoid(self.decay.detach() + 0 * self.decay)"}
    ),
    "scales_a_gradient": Mistake(
        "slopes", {_LOOP: "enumerate(inputs.float() * 1.01 - 0.01 * inputs.detach().float())"}
    ),
    "differs_in_bfloat16": Mistake(
        "bfloat16", {_LOOP: "enumerate(inputs.float() * (1 + (inputs.dtype == torch.bfloat16)))"}
    ),
    "gradient_not_summed": Mistake("tensor_parallel", {"partial_gradient=True": "partial_gradient=False"}),
    "normalises_its_own_channels": Mistake(
        "tensor_parallel",
        {_LOOP: "enumerate(torch.nn.functional.layer_norm(inputs.float(), inputs.shape[-1:]))"},
    ),
    "adds_every_ranks_bias": Mistake(
        "tensor_parallel",
        {"return self.output(activated.to(hidden.dtype))": "return self.output(activated) + self.gain"},
    ),
    "declares_state_replicated": Mistake(
        "tensor_parallel",
        {
            "(self.inner,), shard_dimension=0)}": "(self.inner,), None)}",
            _LEVEL: 'level, decay, levels = state["level"][:, :inputs.shape[-1]],',
        },
    ),
    "gradient_of_own_positions_not_summed": Mistake(
        "sequence_parallel",
        {
            "partial_gradient=True": "partial_gradient=False",
            "torch.tanh(self.gain * torch": "torch.tanh(torch",
            "return self.output(activated": "return self.gain * self.output(activated",
        },
    ),
    "reads_documents_of_own_positions": Mistake(
        "sequence_parallel",
        {"documents.starts[:, position, None]": "documents.starts[:, position % hidden.shape[0], None]"},
    ),
    "undeclared_parameter": Mistake(
        "first_weights",
        {"self.gain = new_parameter((1,), gain)": "self.gain = torch.nn.Parameter(torch.ones(1))"},
    ),
    "starts_outside_the_seed": Mistake(
        "first_weights",
        {"ParameterSpec(constant(1.0)": "ParameterSpec(lambda tensor, generator: tensor.normal_()"},
    ),
    "starts_partly_unfilled": Mistake(
        "first_weights", {"ParameterSpec(constant(1.0)": "ParameterSpec(lambda tensor, generator: None"}
    ),
    "forgets_a_parameter": Mistake("cost", {" parameters=weights + inner + 1": " parameters=weights"}),
    "forgets_a_replicated_one": Mistake("cost", {"parameters_replicated=1": "parameters_replicated=0"}),
    "forgets_a_product": Mistake("cost", {"flops_per_token=2.0 * weights": "flops_per_token=1.0 * weights"}),
    "forgets_state": Mistake("cost", {"state_bytes=4 * inner": "state_bytes=2 * inner"}),
    "accepts_every_split": Mistake("problem", {"if inner % tensor_parallel:": "if inner < tensor_parallel < 0:"}),
    "refuses_its_examples": Mistake("problem", {"if inner % tensor_parallel:": "if inner % 17:"}),
    "carries_along_the_sequence": Mistake(
        "carried",
        {"    @classmethod": "    def carried(self, hidden_size):\n        return {'level': 1}\n\n    @classmethod"},
    ),
    "leaves_out_a_name": Mistake(
        "hugging_face_names",
        {
            _KEYS: 'KEYS = {"class": {"decay": "decay"}}',
            _FIELDS: 'FIELDS = {"class": lambda config, hidden_size: {}}',
        },
    ),
}
