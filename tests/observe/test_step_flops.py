"""The FLOPs that a step's throughput counts: of the length it was trained at, and of the chunks that were chosen."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.checkpoint.training import TrainingPosition
from pretrain.config import load_config
from pretrain.observe.metrics import read_metrics
from pretrain.observe.observer import Observer
from pretrain.observe.run_directory import RunDirectory
from pretrain.parallel.engine import StepResult
from pretrain.parallel.schedule import BatchLoss
from pretrain.plan import device_peak_flops_per_second, model_flops_per_token

RUNS = Path(__file__).parents[2] / "configs" / "runs"


def observer(family: str, directory: Path, peak: float | None = None) -> Observer:
    config = load_config(RUNS / f"{family}_tiny.yaml", ["parallel.data=1"])
    return Observer(config, RunDirectory(directory), 0, True, peak)


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


@pytest.mark.parametrize("peak", [None, 1e12])
def test_utilization_is_useful_work_over_what_the_devices_could_do(peak: float | None, tmp_path: Path) -> None:
    watching = observer("xlstm", tmp_path, peak)
    watching.open()
    watching.start_step()
    loss = BatchLoss(nats=20.0, labels=10, bytes=10)
    length = watching.config.data.sequence_length
    position = TrainingPosition(step=1, samples=1, tokens=64)
    watching.finish_step(loss, StepResult(1.0, applied=True), 1e-3, 64, position, length, {})
    watching.sync()
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    if peak is None:
        assert "model_flops_utilization" not in record
    else:
        assert record["model_flops_utilization"] == pytest.approx(record["tflops_per_second"] * 1e12 / peak)


def test_devices_are_known_by_the_names_that_drivers_give() -> None:
    names = {
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA H100 80GB HBM3": 989.4e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H200": 989.4e12,
        "NVIDIA B200": 2250e12,
        "AMD Instinct MI300X": 1307.4e12,
        "NVIDIA L40S": 362.05e12,
        "NVIDIA GeForce RTX 4090": 165.2e12,
        "NVIDIA GB200": 2500e12,
        "NVIDIA H100 NVL": 835e12,
        "NVIDIA L40": None,
        "Tesla V100-SXM2-32GB": None,
    }
    assert {name: device_peak_flops_per_second(name) for name in names} == names
