"""Which layers pipeline stages hold, and what a plan makes of stages that hold different numbers."""

from __future__ import annotations

import pytest

from pretrain.config.stages import layers_of_stages
from pretrain.errors import InputError
from pretrain.plan import plan
from tests.configurations import tiny_config


def test_an_even_split_gives_the_first_stages_one_more() -> None:
    assert layers_of_stages(10, 4) == [range(0, 3), range(3, 6), range(6, 8), range(8, 10)]
    assert layers_of_stages(8, 2) == [range(0, 4), range(4, 8)]
    assert layers_of_stages(6, 3, [1, 3, 2]) == [range(0, 1), range(1, 4), range(4, 6)]


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"pipeline": 8}, "model.num_layers=4 is fewer than parallel.pipeline=8"),
        ({"pipeline": 2, "layers_per_stage": [1, 2, 1]}, "has 3 numbers, but parallel.pipeline=2"),
        ({"pipeline": 2, "layers_per_stage": [1, 2]}, "adds up to 3, but model.num_layers=4"),
        ({"pipeline": 2, "layers_per_stage": [0, 4]}, "layers_per_stage"),
    ],
)
def test_stages_that_cannot_be(parallel: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny_config(parallel=parallel)


def test_a_plan_counts_each_stage_as_it_is() -> None:
    uneven = plan(tiny_config(parallel={"pipeline": 2, "layers_per_stage": [1, 3], "zero": 0}))
    whole = plan(tiny_config(parallel={"pipeline": 1, "zero": 0}))
    assert [stage.layers for stage in uneven.stages] == [1, 3]
    assert sum(stage.parameters for stage in uneven.stages) == whole.parameters
    each = uneven.stages[1].parameters - uneven.stages[0].parameters
    # Two layers more, and the norm before the head, whose weight is as large as the embedding.
    hidden = 64
    assert each == 2 * (uneven.stages[0].parameters - 264 * hidden) + hidden


def test_contexts_of_uneven_stages() -> None:
    parallel = {"context": 2, "pipeline": 2, "zero": 0}
    even, uneven = (
        plan(tiny_config(parallel=parallel | {"layers_per_stage": sizes})).context.bytes_per_step
        for sizes in ([2, 2], [1, 3])
    )
    assert uneven == pytest.approx(1.5 * even)
