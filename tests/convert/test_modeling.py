"""Each mixer's ``modeling.py``, which exported models bring along, computes what the mixer computes."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
from torch import Tensor, nn

from pretrain.convert.custom import modeling_module
from pretrain.models.mixer import Carried, ChannelMixer, SequenceMixer, State
from tests.conformance.cases import Case, channel_cases, sequence_cases
from tests.conformance.checks import random_cuts
from tests.conformance.tools import (
    GRADIENT_TOLERANCE,
    OUTPUT_TOLERANCE,
    assert_all_close,
    assert_close,
    assert_every_parameter_matters,
    build,
    call,
    carried_of,
    gradients,
    random_hidden,
    random_length,
    weighted_sum,
)

# The README's mixer is an example of the least that a mixer needs, which this is not part of.
CASES = [case for case in (*sequence_cases(), *channel_cases()) if not case.name.startswith("readme")]


def exported_form(case: Case, mixer: SequenceMixer | ChannelMixer) -> nn.Module:
    """The mixer's exported class with its weights, made from settings that went through JSON."""
    name = modeling_module(case.family)
    assert name is not None, f"{case.family.package} has no modeling.py, or no settings in hf.py"
    settings = json.loads(json.dumps(case.family.hugging_face.settings(case.config, case.hidden_size)))
    kind = importlib.import_module(name).MODELING
    exported = kind(case.hidden_size, **settings)
    if hasattr(kind, "shared_modules"):
        exported.shared = nn.ModuleDict(kind.shared_modules(case.hidden_size, **settings))
    exported.load_state_dict(dict(mixer.named_parameters()), strict=True)
    return exported


def of_channel(exported: nn.Module, hidden: Tensor, carried: Carried) -> tuple[Tensor, Carried]:
    """Output of a channel mixer, and what it hands on."""
    return exported(hidden, carried) if getattr(exported, "carried", {}) else (exported(hidden), {})


def in_pieces(exported: nn.Module, hidden: Tensor, lengths: list[int]) -> tuple[Tensor, State]:
    """``(batch, sequence, hidden_size)`` in several calls that hand on the state."""
    outputs, state = [], None
    for piece in hidden.split(lengths, 1):
        output, state = exported(piece, state)
        outputs.append(output)
    return torch.cat(outputs, 1), state


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_computes_what_the_mixer_computes(case: Case) -> None:
    mixer = build(case)
    exported = exported_form(case, mixer)
    length = random_length(case)
    hidden = random_hidden(case, length, 3).requires_grad_()
    carried = carried_of(case, length, 3)
    expected, handed_on = call(mixer, hidden, carried)
    if isinstance(mixer, ChannelMixer):
        output, also = of_channel(exported, hidden.transpose(0, 1), {n: t.transpose(0, 1) for n, t in carried.items()})
        output = output.transpose(0, 1)
        for name in getattr(exported, "carried", {}):
            assert_close(also[name].transpose(0, 1), handed_on[name], OUTPUT_TOLERANCE, name)
    else:
        output = exported(hidden.transpose(0, 1), None)[0].transpose(0, 1)
    assert_close(output, expected, OUTPUT_TOLERANCE, "output")
    inputs = {"hidden": hidden}
    slopes = gradients(weighted_sum(case, {"output": expected}), mixer, inputs)
    assert_every_parameter_matters(mixer, slopes)
    found = gradients(weighted_sum(case, {"output": output}), exported, inputs)
    assert_all_close(found, slopes, GRADIENT_TOLERANCE, "gradient")


@pytest.mark.parametrize("case", [case for case in CASES if case.family.kind == "sequence"], ids=str)
def test_chunks_and_single_tokens_are_one_pass(case: Case) -> None:
    exported = exported_form(case, build(case))
    length = random_length(case)
    hidden = random_hidden(case, length, 2).transpose(0, 1)
    whole, final = exported(hidden, None)
    for lengths in (random_cuts(case, length), [1] * length):
        output, state = in_pieces(exported, hidden, lengths)
        assert_close(output, whole, OUTPUT_TOLERANCE, f"pieces {lengths}")
        assert_all_close(state, final, OUTPUT_TOLERANCE, f"state after {lengths}")
    for name, tensor in final.items():
        # What a cache holds is picked by sequence, and kept in float32.
        assert (tensor.shape[0], tensor.dtype) == (2, torch.float32), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bfloat16_runs(case: Case) -> None:
    exported = exported_form(case, build(case)).to(torch.bfloat16)
    hidden = random_hidden(case, 9, 2).transpose(0, 1).to(torch.bfloat16)
    if case.family.kind == "channel":
        carried = {name: tensor.transpose(0, 1) for name, tensor in carried_of(case, 9, 2).items()}
        output, _ = of_channel(exported, hidden, carried)
    else:
        output, _ = in_pieces(exported, hidden, [7, 2])
    assert output.dtype == torch.bfloat16
    assert output.isfinite().all()
