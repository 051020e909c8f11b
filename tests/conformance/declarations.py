"""What a mixer declares. Each check takes one case and fails where a declaration is not true."""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from pretrain.convert.native import assemble
from pretrain.errors import InputError
from pretrain.models.hugging_face import pieces_of_tensors, places_within
from pretrain.models.mixer import SequenceMixer, State
from pretrain.models.parameters import initialise_weights
from tests.conformance.cases import Case
from tests.conformance.tools import (
    NUM_LAYERS,
    alone,
    build,
    call,
    context_of,
    gradients,
    random_carried,
    random_hidden,
    random_length,
)


def _baddbmm_flops(_: object, left: torch.Size, right: torch.Size, **__: object) -> int:
    batch, rows, inner = left
    return 2 * batch * rows * inner * right[2]


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward_flops(
    gradient: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object
) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


# Operations that torch's counter leaves out.
FLOP_FORMULAS = {
    torch.ops.aten.baddbmm_: _baddbmm_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


def _counted_flops(run: Callable[[], object]) -> int:
    """FLOPs of matrix products."""
    with FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as counter:
        run()
    return counter.get_total_flops()


def cost(case: Case) -> None:
    """Counted parameters, matrix products forward and backward, and state are those of ``cost.py``."""
    mixer = build(case)
    batch = 2
    for length in (1, 5, 16, random_length(case)):
        declared = case.family.cost(case.config, case.hidden_size, length, 4, NUM_LAYERS)
        hidden = random_hidden(case, length, batch).requires_grad_()
        results: list[tuple[Tensor, State]] = []
        forward = _counted_flops(lambda hidden=hidden, results=results: results.append(call(mixer, hidden)))
        output, state = results.pop()
        backward = _counted_flops(output.sum().backward)
        held = 0
        if isinstance(mixer, SequenceMixer):
            held = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        assert declared.state_bytes * batch == held, f"length {length}: {held / batch} bytes of state"
        projections = declared.projection_flops_per_token
        # Formulas divide by the length, so they hold to float64's rounding.
        for counted, scan, times in (
            (forward, declared.executed_scan_flops_per_token, 1),
            (backward, declared.executed_scan_backward_flops_per_token, 2),
        ):
            expected = (times * projections + scan) * length * batch
            assert math.isclose(counted, expected, rel_tol=1e-9), f"length {length}: {counted} FLOPs, not {expected}"
        assert declared.scan_flops_per_token <= declared.executed_scan_flops_per_token
    parameters = list(mixer.parameters())
    replicated = [parameter for parameter in parameters if parameter.spec.shard_dimension is None]
    shared = {name: sum(map(Tensor.numel, module.parameters())) for name, module in mixer.shared.items()}
    assert declared.shared_parameters == shared
    together = sum(shared.values())
    assert declared.parameters + together == sum(map(Tensor.numel, parameters))
    assert declared.parameters_replicated + together == sum(map(Tensor.numel, replicated))
    assert declared.parameters_routed == sum(parameter.numel() for parameter in parameters if parameter.spec.expert)
    assert (declared.parameters_routed > 0) == (case.config.routed_experts() > 0)
    assert 0 < declared.active_parameters <= declared.parameters


def carried(case: Case) -> None:
    """What a channel mixer carries is float32 of the size that it says, and changes; the rest is handed on as it came.

    Gradients reach what it was given.
    """
    mixer, channels = build(case), case.config.carried(case.hidden_size)
    assert not (channels and isinstance(mixer, SequenceMixer)), "only a channel mixer may carry anything"
    for dtype in (torch.float32, torch.bfloat16):
        hidden = random_hidden(case, 7, 2).to(dtype)
        given = {name: tensor.requires_grad_() for name, tensor in random_carried(case, 7, 2).items()}
        output, returned = call(mixer, hidden, given)
        assert output.shape == hidden.shape and output.dtype == dtype
        if not channels:
            continue
        assert returned.keys() == given.keys()
        assert returned["of another mixer"] is given["of another mixer"]
        for name, size in channels.items():
            assert (returned[name].shape, returned[name].dtype) == ((7, 2, size), torch.float32), name
            assert (returned[name] - given[name]).abs().max() > 0, f"{name} is not changed"
        slopes = gradients(torch.stack([returned[name].square().sum() for name in channels]).sum(), mixer, given)
        assert all(slopes[name].abs().max() > 0 for name in channels), "no gradient reaches what was given"


def _first_weights(case: Case, seed: int, name: str) -> dict[str, Tensor]:
    """First values of a mixer that is called ``name``."""
    mixer = alone(case.family, case.config, context_of(case.hidden_size))
    initialise_weights(nn.ModuleDict({name: mixer}), seed)
    for parameter_name, parameter in mixer.named_parameters():
        unfilled = torch.full_like(parameter, math.nan)
        parameter.spec.initialise(unfilled.detach(), torch.Generator())
        assert unfilled.isfinite().all(), f"{parameter_name} is not filled"
    return {name: parameter.detach() for name, parameter in mixer.named_parameters()}


def first_weights(case: Case) -> None:
    """Every parameter is declared and filled, from the seed and its name alone."""
    try:
        first, again = (_first_weights(case, 1, "first") for _ in range(2))
    except TypeError as error:
        raise AssertionError(f"a parameter is not declared: {error}") from error
    other_seed, other_name = _first_weights(case, 2, "first"), _first_weights(case, 1, "second")
    drawn = set()
    for name, value in first.items():
        assert value.dtype == torch.float32, f"{name} is {value.dtype}"
        assert torch.equal(value, again[name]), f"{name} does not depend on the seed and name alone"
        by_seed = not torch.equal(value, other_seed[name])
        assert by_seed == (not torch.equal(value, other_name[name])), f"{name} ignores its seed or its name"
        drawn |= {name} if by_seed else set()
    assert drawn, "no parameter is drawn at random"


def problem(case: Case) -> None:
    """What is accepted works; what does not divide is refused in one sentence."""
    config, width = case.config, case.hidden_size
    for ranks in (1, 2):
        assert config.problem(width, ranks) is None, f"an example must go with {ranks} ranks"
    mixer, declared = build(case), case.family.cost(config, width, 16, 4, NUM_LAYERS)
    split = [p for p in mixer.parameters() if p.spec.shard_dimension is not None]
    states = []
    if isinstance(mixer, SequenceMixer):
        states = [tensor for tensor in mixer.state_tensors().values() if tensor.shard_dimension is not None]
    refusals = []
    # The last is a prime beyond any width here.
    for ranks in (*range(1, 2 * width), 8191):
        refusal = config.problem(width, ranks)
        refusals.append(refusal)
        if refusal is None:
            undivided = [p for p in split if p.shape[p.spec.shard_dimension] % ranks]
            whole = sum(parameter.numel() for parameter in undivided)
            # Of groups that the ranks do not divide every rank holds all, and says so in its cost.
            allowed = declared.parameters_grouped if declared.parameter_groups % ranks else 0
            assert whole <= allowed, f"{ranks} ranks are accepted, but do not divide {[p.shape for p in undivided]}"
            assert allowed or all(tensor.shape[tensor.shard_dimension] % ranks == 0 for tensor in states)
    assert refusals[-1] or not split
    context = context_of(width)
    for other in range(1, width + 9):
        refusal = config.problem(other, 1)
        refusals.append(refusal)
        if refusal is None:
            built = alone(case.family, config, replace(context, hidden_size=other))
            initialise_weights(built, 0)
            hidden = torch.zeros(3, 2, other)
            assert call(built, hidden)[0].shape == hidden.shape, f"hidden_size={other} is accepted"
    for refusal in filter(None, refusals):
        assert "\n" not in refusal and not refusal.endswith("."), f"not one clause to end a message: {refusal!r}"


def hugging_face_names(case: Case) -> None:
    """For each native class that has this layer, every parameter has exactly one place of its own there."""
    form, family = case.family.hugging_face, case.family
    assert set(form.KEYS) == set(form.FIELDS), "KEYS and FIELDS must list the same classes"
    assert set(getattr(form, "LAYER_TYPES", {})) <= set(form.KEYS), "LAYER_TYPES must list classes of KEYS"
    sections = getattr(form, "SECTIONS", {})
    assert set(sections) <= set(form.KEYS), "SECTIONS must list classes of KEYS"
    parameters = dict(build(case).named_parameters())
    others = [replace(case, config=config) for config in family.config.examples(case.hidden_size)]
    known = set(parameters).union(*(dict(build(other).named_parameters()) for other in others))
    outputs = getattr(form, "OUTPUTS", ())
    unmatched = [pattern for pattern in outputs if not fnmatch.filter(known, pattern)]
    assert not unmatched, f"OUTPUTS match no parameter of any example: {unmatched}"
    for model_type in form.KEYS:
        places = places_within(form, model_type, case.config)
        assert set(places) <= known, f"{model_type}: no example has {sorted(set(places) - known)}"
        try:
            fields = form.FIELDS[model_type](case.config, case.hidden_size)
        except InputError as error:
            # The class has the layer, but not with this configuration.
            assert "\n" not in str(error) and not str(error).endswith("."), f"not one clause: {str(error)!r}"
            continue
        assert json.loads(json.dumps(fields)) == fields, f"{model_type}: fields that JSON does not hold: {fields}"
        if model_type in sections:
            back = type(case.config).model_validate(sections[model_type](fields))
            again = form.FIELDS[model_type](back, case.hidden_size)
            assert again == fields, f"{model_type}: SECTIONS do not lead back to {fields}, but to {again}"
        try:
            tensors = pieces_of_tensors(places, parameters)
        except ValueError as error:
            raise AssertionError(f"{model_type}: {error}") from error
        for name, pieces in tensors.items():
            assert [piece.order for piece in pieces.values()] == list(range(len(pieces))), f"{name} has a gap"
            tensor = assemble(parameters, pieces)
            assert tensor.numel() == sum(parameters[piece].numel() for piece in pieces), f"{name} repeats or loses some"
