"""The checks of the mixer contract. Each takes one case and fails where the mixer breaks its promise.

Differences are measured against the largest value of the tensor expected. All is float32 unless said
otherwise: 2e-5 allows for sums of some dozens of terms in another order, gradients for ten times that, since they
pass through more of them; every mistake in ``mistakes`` makes a difference of at least 1e-3.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pretrain.models.mixer import ChannelMixer, Documents, LayerContext, SequenceMixer, State
from pretrain.models.parameters import declared_parameters, full_shape, initialise_weights, shard_of
from pretrain.parallel.topology import build_topology, megatron_config
from tests.conformance.cases import Case
from tests.configurations import tiny_config

OUTPUT_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 2e-4
# Of a tensor's norm. bfloat16 keeps 8 bits: roundings are 2e-3 on average, but 1e-2 of a factor in an exponential
# gate whose argument is 4, and several follow one another.
BFLOAT16_TOLERANCE = 8e-2

NUM_LAYERS = 3


def generator_of(case: Case, purpose: str = "") -> torch.Generator:
    """Random numbers that depend on the case and the purpose alone."""
    return torch.Generator().manual_seed(zlib.crc32(f"{case.name}/{purpose}".encode()))


def context_of(hidden_size: int, tensor: int = 1, sequence: bool = False) -> LayerContext:
    """Builds the groups of this layout, in this process or on every rank of a pool, and a layer's place in it."""
    # Of the model in this configuration, only the parallel sizes reach a mixer.
    config = tiny_config(parallel={"tensor": tensor, "sequence": sequence, "zero": 0})
    build_topology(config)
    return LayerContext(hidden_size, layer=1, num_layers=NUM_LAYERS, megatron=megatron_config(config))


def build(case: Case, tensor: int = 1, sequence: bool = False) -> SequenceMixer | ChannelMixer:
    """The case's mixer, every parameter moved away from its first value, the same in every layout."""
    mixer = case.family.module(case.config, context_of(case.hidden_size, tensor, sequence))
    initialise_weights(mixer, seed=1)
    with torch.no_grad():
        for name, parameter in declared_parameters(mixer):
            shape = full_shape(parameter)
            noise = torch.randn(shape, generator=generator_of(case, name))
            scale = 0.3 if len(shape) == 1 else 0.7 / math.sqrt(math.prod(shape[1:]))
            parameter.add_(shard_of(scale * noise, parameter.spec))
    return mixer


def random_hidden(case: Case, length: int, batch: int, purpose: str = "hidden") -> Tensor:
    """``(sequence, batch, hidden_size)``."""
    return torch.randn(length, batch, case.hidden_size, generator=generator_of(case, purpose))


def random_length(case: Case) -> int:
    return int(torch.randint(17, 30, (), generator=generator_of(case, "length")))


def random_cuts(case: Case, length: int, purpose: str = "cuts") -> list[int]:
    """Lengths of random pieces that together are ``length``."""
    generator, pieces = generator_of(case, purpose), []
    while length:
        pieces.append(min(length, int(torch.randint(1, 10, (), generator=generator))))
        length -= pieces[-1]
    return pieces


def earlier_state(case: Case, mixer: SequenceMixer, batch: int) -> State:
    """A state as five other tokens leave it, without their graph."""
    with torch.no_grad():
        _, state = mixer(random_hidden(case, 5, batch, "earlier"), None, None)
    return {name: tensor.clone().requires_grad_() for name, tensor in state.items()}


def run_pieces(
    mixer: SequenceMixer, hidden: Tensor, lengths: Sequence[int], state: State | None, starts: Tensor | None
) -> tuple[Tensor, State]:
    """One call after the other, each handed the state of the one before."""
    outputs = []
    position = 0
    for length in lengths:
        here = slice(position, position + length)
        documents = None if starts is None else Documents(starts[:, here])
        output, state = mixer(hidden[here], state, documents)
        outputs.append(output)
        position += length
    return torch.cat(outputs), state


def weighted_sum(case: Case, tensors: Mapping[str, Tensor]) -> Tensor:
    """A scalar whose gradient reaches every element of every tensor with another weight."""
    terms = [
        (tensor * torch.randn(tensor.shape, generator=generator_of(case, f"weight of {name}"))).sum()
        for name, tensor in tensors.items()
    ]
    return torch.stack(terms).sum()


def gradients(scalar: Tensor, mixer: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of the inputs and of every parameter, by name; zero where there is no path."""
    wanted = dict(inputs) | dict(mixer.named_parameters())
    found = torch.autograd.grad(scalar, list(wanted.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(wanted, found, strict=True))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """The largest difference is small beside the largest value expected."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    scale = float(expected.detach().abs().max())
    error = float((actual.detach().float() - expected.detach().float()).abs().max())
    assert error <= tolerance * scale, f"{what}: differs by {error:.2g} where the largest value is {scale:.2g}"


def assert_all_close(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float, what: str
) -> None:
    assert actual.keys() == expected.keys(), f"{what}: {sorted(actual)}, not {sorted(expected)}"
    for name, tensor in actual.items():
        assert_close(tensor, expected[name], tolerance, f"{what}, {name}")


def assert_every_parameter_matters(mixer: nn.Module, found: Mapping[str, Tensor]) -> None:
    for name, _ in mixer.named_parameters():
        assert found[name].abs().max() > 0, f"the gradient of {name} is zero: the check would prove nothing of it"


def random_starts(case: Case, length: int) -> Tensor:
    """``(3, length)``: starts at the first token and at random; at consecutive and the last tokens; nowhere."""
    starts = torch.zeros(3, length, dtype=torch.bool)
    starts[0] = torch.rand(length, generator=generator_of(case, "starts")) < 0.2
    starts[0, 0] = True
    starts[1, [5, 6, 7, length - 1]] = True
    return starts


def cutting(case: Case) -> None:
    """Chunks of any length and single tokens, from the beginning or from a state, are one pass."""
    mixer, length = build(case), random_length(case)
    hidden = random_hidden(case, length, 3).requires_grad_()
    for beginning in ("none", "state"):
        state = None if beginning == "none" else earlier_state(case, mixer, 3)
        starts = None if beginning == "none" else random_starts(case, length)
        inputs = {"hidden": hidden} | {f"initial {name}": tensor for name, tensor in (state or {}).items()}
        whole, final = run_pieces(mixer, hidden, [length], state, starts)
        expected = gradients(weighted_sum(case, {"output": whole} | final), mixer, inputs)
        assert_every_parameter_matters(mixer, expected)
        for name, lengths in {"chunks": random_cuts(case, length), "tokens": [1] * length}.items():
            what = f"{name}, initial state {beginning}"
            output, last = run_pieces(mixer, hidden, lengths, state, starts)
            assert_close(output, whole, OUTPUT_TOLERANCE, f"{what}, output")
            assert_all_close(last, final, OUTPUT_TOLERANCE, f"{what}, final state")
            found = gradients(weighted_sum(case, {"output": output} | last), mixer, inputs)
            assert_all_close(found, expected, GRADIENT_TOLERANCE, f"{what}, gradient")
            # Decoding records no graph, for which a mixer may have another path.
            with torch.no_grad():
                output, last = run_pieces(mixer, hidden, lengths, state, starts)
            assert_close(output, whole, OUTPUT_TOLERANCE, f"{what}, output without a graph")
            assert_all_close(last, final, OUTPUT_TOLERANCE, f"{what}, final state without a graph")


@torch.no_grad()
def causality(case: Case) -> None:
    """A changed token changes no earlier output and no other sequence, but its own output and later ones.

    Earlier outputs may change by rounding: a kernel may scale a chunk by its largest gate.
    """
    mixer, length = build(case), random_length(case)
    hidden = random_hidden(case, length, 2)
    before, _ = mixer(hidden, None, None)
    for position in (0, 3, length // 2, length - 2):
        changed = hidden.clone()
        changed[position, 0] += 3 * random_hidden(case, 1, 1, "change")[0, 0]
        after, _ = mixer(changed, None, None)
        assert_close(after[:, 1], before[:, 1], OUTPUT_TOLERANCE, f"token {position}, other sequence")
        if position:
            assert_close(after[:position], before[:position], OUTPUT_TOLERANCE, f"token {position}, earlier outputs")
        change = (after - before)[position:, 0].abs().amax(dim=-1) / before.abs().max()
        assert change[0] > 1e-3, f"token {position} does not change its own output"
        assert change[1:].max() > 1e-3, f"token {position} changes no later output"


def documents(case: Case) -> None:
    """Documents packed into one call are documents alone; the state given reaches the first one only."""
    mixer, length = build(case), random_length(case)
    starts = random_starts(case, length)
    hidden = random_hidden(case, length, 3).requires_grad_()
    state = earlier_state(case, mixer, 3)
    inputs = {"hidden": hidden} | {f"initial {name}": tensor for name, tensor in state.items()}

    outputs, finals = [], []
    for row in range(3):
        edges = [0, *(int(t) for t in starts[row].nonzero() if t), length]
        pieces = []
        for first, last in zip(edges, edges[1:], strict=False):
            own = None if starts[row, first] else {name: tensor[row : row + 1] for name, tensor in state.items()}
            output, final = mixer(hidden[first:last, row : row + 1], own, None)
            pieces.append(output)
        outputs.append(torch.cat(pieces))
        finals.append(final)
    alone = {"output": torch.cat(outputs, dim=1)}
    alone |= {name: torch.cat([final[name] for final in finals]) for name in state}
    expected = gradients(weighted_sum(case, alone), mixer, inputs)
    assert_every_parameter_matters(mixer, expected)

    output, final = mixer(hidden, state, Documents(starts))
    packed = {"output": output} | final
    assert_all_close(packed, alone, OUTPUT_TOLERANCE, "packed documents")
    assert_all_close(
        gradients(weighted_sum(case, packed), mixer, inputs), expected, GRADIENT_TOLERANCE, "packed documents, gradient"
    )


@torch.no_grad()
def state(case: Case) -> None:
    """What is declared is what is returned, and the initial state is what None stands for."""
    mixer = build(case)
    declared = mixer.state_tensors()
    initial = mixer.initial_state(2, torch.device("cpu"))
    hidden = random_hidden(case, 7, 2)
    for dtype in (torch.float32, torch.bfloat16):
        output, final = mixer(hidden.to(dtype), None, None)
        assert output.shape == hidden.shape and output.dtype == dtype
        for what, tensors in (("initial", initial), ("final", final)):
            found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
            expected = {name: ((2, *tensor.shape), torch.float32) for name, tensor in declared.items()}
            assert found == expected, f"{what} state of {dtype}"
    output, final = mixer(hidden, None, None)
    from_initial, final_from_initial = mixer(hidden, initial, None)
    assert_close(from_initial, output, OUTPUT_TOLERANCE, "output from initial_state()")
    assert_all_close(final_from_initial, final, OUTPUT_TOLERANCE, "state from initial_state()")


def _call(mixer: nn.Module, hidden: Tensor) -> tuple[Tensor, State]:
    """A sequence mixer from the beginning, or a channel mixer."""
    return mixer(hidden, None, None) if isinstance(mixer, SequenceMixer) else (mixer(hidden), {})


def bfloat16(case: Case) -> None:
    """bfloat16 activations give the outputs, states and gradients of float32, but for rounding."""
    mixer = build(case)
    exact = random_hidden(case, random_length(case), 2).bfloat16()
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        hidden = exact.to(dtype).requires_grad_()
        output, final = _call(mixer, hidden)
        assert output.dtype == dtype
        values = {"output": output} | final
        found = gradients(weighted_sum(case, values), mixer, {"hidden": hidden})
        assert all(found[name].dtype == torch.float32 for name, _ in mixer.named_parameters())
        results.append(values | {f"gradient of {name}": gradient for name, gradient in found.items()})
    assert results[1].keys() == results[0].keys()
    for name, expected in results[0].items():
        error = (results[1][name] - expected).norm() / expected.norm()
        assert error < BFLOAT16_TOLERANCE, f"bfloat16, {name}: differs by {error:.2g} of its norm"


@torch.no_grad()
def positions_are_apart(case: Case) -> None:
    """A channel mixer's output at a position depends on its input there, and on nothing else."""
    mixer = build(case)
    hidden = random_hidden(case, 9, 2)
    whole = mixer(hidden)
    for position in range(9):
        alone = mixer(hidden[position : position + 1, 1:])
        assert_close(alone, whole[position : position + 1, 1:], OUTPUT_TOLERANCE, f"position {position} alone")
    assert (whole[1:] - whole[:-1]).abs().max() > 1e-2 * whole.abs().max(), "the output does not depend on the input"


def _baddbmm_flops(_: object, left: torch.Size, right: torch.Size, **__: object) -> int:
    batch, rows, inner = left
    return 2 * batch * rows * inner * right[2]


def _counted_flops(run: Callable[[], object]) -> int:
    """FLOPs of matrix products, with the in-place form of baddbmm, which torch's counter leaves out."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: _baddbmm_flops}) as counter:
        run()
    return counter.get_total_flops()


def cost(case: Case) -> None:
    """Counted parameters, matrix products forward and backward, and state are those of ``cost.py``."""
    mixer = build(case)
    batch = 2
    for length in (1, 5, 16, random_length(case)):
        declared = case.family.cost(case.config, case.hidden_size, length, 4, NUM_LAYERS)
        hidden = random_hidden(case, length, batch).requires_grad_()
        outputs: list[Tensor] = []
        forward = _counted_flops(lambda hidden=hidden, outputs=outputs: outputs.append(_call(mixer, hidden)[0]))
        backward = _counted_flops(lambda outputs=outputs: outputs[0].sum().backward())
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
    assert declared.parameters == sum(map(Tensor.numel, parameters))
    assert declared.parameters_replicated == sum(map(Tensor.numel, replicated))
    assert 0 < declared.active_parameters <= declared.parameters
    tensors = mixer.state_tensors().values() if isinstance(mixer, SequenceMixer) else ()
    assert declared.state_bytes == sum(4 * math.prod(tensor.shape) for tensor in tensors)


def _first_weights(case: Case, seed: int, name: str) -> dict[str, Tensor]:
    """First values of a mixer that is called ``name``, over memory that holds no number."""
    mixer = case.family.module(case.config, context_of(case.hidden_size))
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.fill_(math.nan)
    initialise_weights(nn.ModuleDict({name: mixer}), seed)
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
        assert value.isfinite().all(), f"{name} is not filled"
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
    mixer = build(case)
    sizes = [p.shape[p.spec.shard_dimension] for p in mixer.parameters() if p.spec.shard_dimension is not None]
    if isinstance(mixer, SequenceMixer):
        split = [tensor for tensor in mixer.state_tensors().values() if tensor.shard_dimension is not None]
        sizes += [tensor.shape[tensor.shard_dimension] for tensor in split]
    refusals = []
    # The last is a prime beyond any width here.
    for ranks in (*range(1, 2 * width), 8191):
        refusal = config.problem(width, ranks)
        divides = all(size % ranks == 0 for size in sizes)
        assert refusal or divides, f"{ranks} ranks are accepted, but do not divide {sorted(set(sizes))}"
        refusals.append(refusal)
    assert refusals[-1] or not sizes
    context = context_of(width)
    for other in range(1, width + 9):
        refusal = config.problem(other, 1)
        refusals.append(refusal)
        if refusal is None:
            built = case.family.module(config, replace(context, hidden_size=other))
            hidden = torch.zeros(3, 2, other)
            assert _call(built, hidden)[0].shape == hidden.shape, f"hidden_size={other} is accepted"
    for refusal in filter(None, refusals):
        assert "\n" not in refusal and not refusal.endswith("."), f"not one clause to end a message: {refusal!r}"


def hugging_face_names(case: Case) -> None:
    """For each native class that has this layer, every parameter has exactly one name of its own there."""
    form = case.family.hugging_face
    assert set(form.KEYS) == set(form.FIELDS), "KEYS and FIELDS must list the same classes"
    parameters = {name for name, _ in build(case).named_parameters()}
    for model_type, names in form.KEYS.items():
        assert set(names) == parameters, f"{model_type}: {sorted(set(names) ^ parameters)}"
        assert len(set(names.values())) == len(names), f"{model_type}: two parameters have one name"
        assert isinstance(form.FIELDS[model_type](case.config, case.hidden_size), dict)
