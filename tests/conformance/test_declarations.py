"""What a mixer declares: costs, first weights, sizes that it refuses, names in the Hugging Face form."""

from __future__ import annotations

import pydantic
import pytest

from pretrain.models.registry import channel_mixers, config_union, sequence_mixers
from tests.conformance import declarations
from tests.conformance.cases import Case, channel_cases, sequence_cases

every = pytest.mark.parametrize("case", (*sequence_cases(), *channel_cases()), ids=str)


@every
def test_cost(case: Case) -> None:
    declarations.cost(case)


@every
def test_first_weights(case: Case) -> None:
    declarations.first_weights(case)


@every
def test_problem(case: Case) -> None:
    declarations.problem(case)


@every
def test_hugging_face_names(case: Case) -> None:
    declarations.hugging_face_names(case)


@every
def test_carried(case: Case) -> None:
    declarations.carried(case)


def test_sections_of_all_mixers_are_told_apart_by_their_type() -> None:
    cases = (*sequence_cases(), *channel_cases())
    families = {case.family.name: case.family for case in cases}
    union = pydantic.TypeAdapter(config_union(families) | None)
    for case in cases:
        if families[case.family.name] is not case.family:
            # The README's mixer, where someone has added it as a folder too.
            continue
        parsed = union.validate_python(case.config.model_dump(mode="json"))
        assert parsed == case.config and type(parsed) is type(case.config)
        assert union.validate_python(case.config) == case.config
    for section in ({"type": "no such mixer"}, {}):
        with pytest.raises(pydantic.ValidationError, match="union_tag"):
            union.validate_python(section)
    with pytest.raises(pydantic.ValidationError, match="extra_forbidden"):
        union.validate_python(cases[0].config.model_dump() | {"no_such_key": 1})


@pytest.mark.parametrize("mixers", [sequence_mixers, channel_mixers])
def test_a_folder_is_named_as_its_type(mixers) -> None:
    for name, family in mixers().items():
        assert family.config.model_fields["type"].default == name
