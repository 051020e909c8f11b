"""The FLOPs that a step's throughput counts: of the length it was trained at, and of the chunks that were chosen."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.config import load_config
from pretrain.observe.observer import Observer
from pretrain.observe.run_directory import RunDirectory
from pretrain.plan import model_flops_per_token

RUNS = Path(__file__).parents[2] / "configs" / "runs"


def observer(family: str, directory: Path) -> Observer:
    config = load_config(RUNS / f"{family}_tiny.yaml", ["parallel.data=1"])
    return Observer(config, RunDirectory(directory), 0, is_main=True)


def test_shorter_rows_take_less_work_where_there_is_attention(tmp_path: Path) -> None:
    watching = observer("xlstm_attention", tmp_path)
    whole = watching.config.data.sequence_length
    assert watching._model_flops(whole, {}) == model_flops_per_token(watching.config)
    assert watching._model_flops(whole // 4, {}) < watching._model_flops(whole, {})
    assert watching._model_flops(whole, {}) == model_flops_per_token(watching.config), "as before"


def test_chunks_that_were_chosen_count(tmp_path: Path) -> None:
    watching = observer("hnet_1stage", tmp_path)
    length, target = watching.config.data.sequence_length, watching.config.model.hierarchy.stages[0].target_ratio
    expected = watching._model_flops(length, {"bytes_per_chunk_0": target})
    assert expected == pytest.approx(model_flops_per_token(watching.config))
    assert watching._model_flops(length, {"bytes_per_chunk_0": 2 * target}) < expected
    assert watching._model_flops(length, {"bytes_per_chunk_0": 1.0}) > expected
