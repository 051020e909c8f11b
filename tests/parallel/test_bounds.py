"""Parameters that declare a bound stay within it, however the optimizer's state is split."""

from __future__ import annotations

import numpy as np
import pytest

from tests.parallel.programs import assemble

BOUND = 0.5
MODEL = {
    "num_layers": 2,
    "layers": ["para_gru"],
    "blocks": {"para_gru": {"mixer": {"type": "para_gru", "num_heads": 2, "recurrent_bound": BOUND}}},
}


@pytest.mark.parametrize(
    ("processes", "parallel"),
    [
        (1, {"zero": 0}),
        (1, {"zero": 1}),
        (2, {"zero": 0}),
        (2, {"zero": 1}),
        (2, {"zero": 2}),
        (2, {"zero": 3}),
        (2, {"tensor": 2, "zero": 1}),
    ],
    ids=str,
)
def test_steps_end_within_the_bound(processes, parallel, worker_pools) -> None:
    # So large a rate that every step would carry most weights past it.
    overrides = {"parallel": parallel, "model": MODEL, "optimizer": {"learning_rate": 1.0}}
    results = worker_pools(processes).run("tests.parallel.programs", "train_steps", overrides=overrides, steps=2)
    weights = assemble(results)
    bounded = [value for name, value in weights.items() if name.endswith("mixer.recurrent")]
    assert len(bounded) == 2
    for value in bounded:
        assert np.abs(value).max() == BOUND
        assert (np.abs(value) == BOUND).mean() > 0.5
    assert np.abs(weights["layers.0.mixer.input_map"]).max() > BOUND
