"""What a mixer computes. Each check takes one case and fails where the mixer breaks its promise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain.models.mixer import Documents, SequenceMixer, State
from pretrain.models.mixer_config import AUXILIARY_LOSS
from tests.conformance.cases import Case
from tests.conformance.tools import (
    GRADIENT_TOLERANCE,
    OUTPUT_TOLERANCE,
    assert_all_close,
    assert_close,
    assert_every_parameter_matters,
    build,
    call,
    carried_of,
    generator_of,
    gradients,
    observable,
    random_hidden,
    random_length,
    weighted_sum,
)

# Of a tensor's norm. bfloat16 keeps 8 bits: roundings are 2e-3 on average, but 1e-2 of a factor in an exponential
# gate whose argument is 4, and several follow one another.
BFLOAT16_TOLERANCE = 8e-2

# Central differences are wrong by the square of the step where the function is curved, and by float32's rounding
# over the step where it is flat, so each gradient must agree with one of these steps.
SLOPE_STEPS = (1e-2, 1e-3, 2e-4)
SLOPE_TOLERANCE = 3e-3


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
        final = observable(case, mixer, final)
        expected = gradients(weighted_sum(case, {"output": whole} | final), mixer, inputs)
        assert_every_parameter_matters(mixer, expected)
        for name, lengths in {"chunks": random_cuts(case, length), "tokens": [1] * length}.items():
            what = f"{name}, initial state {beginning}"
            output, last = run_pieces(mixer, hidden, lengths, state, starts)
            last = observable(case, mixer, last)
            assert_close(output, whole, OUTPUT_TOLERANCE, f"{what}, output")
            assert_all_close(last, final, OUTPUT_TOLERANCE, f"{what}, final state")
            found = gradients(weighted_sum(case, {"output": output} | last), mixer, inputs)
            assert_all_close(found, expected, GRADIENT_TOLERANCE, f"{what}, gradient")
            # Decoding records no graph, for which a mixer may have another path.
            with torch.no_grad():
                output, last = run_pieces(mixer, hidden, lengths, state, starts)
                last = observable(case, mixer, last)
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
        finals.append(observable(case, mixer, final, slice(row, row + 1)))
    alone = {"output": torch.cat(outputs, dim=1)}
    alone |= {name: torch.cat([final[name] for final in finals], int(name not in state)) for name in finals[0]}
    expected = gradients(weighted_sum(case, alone), mixer, inputs)
    assert_every_parameter_matters(mixer, expected)

    output, final = mixer(hidden, state, Documents(starts))
    packed = {"output": output} | observable(case, mixer, final)
    assert_all_close(packed, alone, OUTPUT_TOLERANCE, "packed documents")
    assert_all_close(
        gradients(weighted_sum(case, packed), mixer, inputs),
        expected,
        GRADIENT_TOLERANCE,
        "packed documents, gradient",
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
            expected = {}
            for name, tensor in declared.items():
                # What grows begins empty; how much of it a mixer keeps is its own affair.
                grown = dict(enumerate(found[name][0][1:])) if what == "final" and name in found else {}
                sizes = (grown.get(place, 0) if size is None else size for place, size in enumerate(tensor.shape))
                expected[name] = ((2, *sizes), torch.float32)
            assert found == expected, f"{what} state of {dtype}"
    output, final = mixer(hidden, None, None)
    from_initial, final_from_initial = mixer(hidden, initial, None)
    assert_close(from_initial, output, OUTPUT_TOLERANCE, "output from initial_state()")
    # As where sequences of several lengths are joined: the newest entries are last.
    padded = {
        name: torch.nn.functional.pad(
            tensor, [edge for size in reversed(declared[name].shape) for edge in ((3 if size is None else 0), 0)]
        )
        for name, tensor in final.items()
    }
    assert_all_close(
        observable(case, mixer, padded), observable(case, mixer, final), OUTPUT_TOLERANCE, "zeros in front of the state"
    )
    final, final_from_initial = observable(case, mixer, final), observable(case, mixer, final_from_initial)
    assert_all_close(final_from_initial, final, OUTPUT_TOLERANCE, "state from initial_state()")


def bfloat16(case: Case) -> None:
    """bfloat16 activations give the outputs, states and gradients of float32, but for rounding."""
    mixer, length = build(case), random_length(case)
    exact = random_hidden(case, length, 2).bfloat16()
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        hidden = exact.to(dtype).requires_grad_()
        carried = {name: tensor.requires_grad_() for name, tensor in carried_of(case, length, 2).items()}
        output, final = call(mixer, hidden, carried)
        assert output.dtype == dtype
        values = {"output": output} | final
        found = gradients(weighted_sum(case, values), mixer, {"hidden": hidden} | carried)
        assert all(found[name].dtype == torch.float32 for name, _ in mixer.named_parameters())
        results.append(values | {f"gradient of {name}": gradient for name, gradient in found.items()})
    assert results[1].keys() == results[0].keys()
    for name, expected in results[0].items():
        error = (results[1][name] - expected).norm() / expected.norm()
        assert error < BFLOAT16_TOLERANCE, f"bfloat16, {name}: differs by {error:.2g} of its norm"


def slopes(case: Case) -> None:
    """Gradients are slopes: of the input and of each parameter, along the gradient, by central differences."""
    mixer = build(case)
    length = random_length(case)
    hidden = random_hidden(case, length, 2).requires_grad_()
    carried = {name: tensor.requires_grad_() for name, tensor in carried_of(case, length, 2).items()}
    inputs = {"hidden": hidden} | carried

    def value() -> Tensor:
        output, final = call(mixer, hidden, carried)
        # Summed in float64, so that the difference of two values is not lost in them.
        return weighted_sum(case, {name: tensor.double() for name, tensor in ({"output": output} | final).items()})

    found = gradients(value(), mixer, inputs)
    for name, tensor in (inputs | dict(mixer.named_parameters())).items():
        size = float(found[name].norm())
        direction, measured = found[name] / size, []
        for step in SLOPE_STEPS:
            with torch.no_grad():
                original = tensor.clone()
                tensor.copy_(original + step * direction)
                above = value()
                tensor.copy_(original - step * direction)
                below = value()
                tensor.copy_(original)
            measured.append(float(above - below) / (2 * step))
        error = min(abs(slope - size) for slope in measured)
        assert error <= SLOPE_TOLERANCE * size, f"gradient of {name}: {size:.4g}, but slopes are {measured}"


@torch.no_grad()
def positions_are_apart(case: Case) -> None:
    """A channel mixer's output at a position depends on its input there, and on nothing else."""
    mixer = build(case)
    hidden, carried = random_hidden(case, 9, 2), carried_of(case, 9, 2)
    whole, whole_carried = call(mixer, hidden, carried)
    for position in range(9):
        here = (slice(position, position + 1), slice(1, None))
        alone, handed_on = call(mixer, hidden[here], {name: tensor[here] for name, tensor in carried.items()})
        assert_close(alone, whole[here], OUTPUT_TOLERANCE, f"position {position} alone")
        for name, tensor in handed_on.items():
            # Of losses alone a position's may depend on the others of its sequence.
            if name != AUXILIARY_LOSS:
                assert_close(tensor, whole_carried[name][here], OUTPUT_TOLERANCE, f"position {position}, {name}")
    assert (whole[1:] - whole[:-1]).abs().max() > 1e-2 * whole.abs().max(), "the output does not depend on the input"
