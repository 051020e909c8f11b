"""The same run on a CUDA device: Triton kernels, the same curve as on the CPU."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pretrain.checkpoint import list_checkpoints
from tests.runs import curve, pretrain, write_config

pytestmark = pytest.mark.gpu

CONFIGS = Path(__file__).parents[2] / "configs"
FAMILIES = sorted(path.name for path in (CONFIGS / "models").iterdir())


def curve_on(directory, device, **train):
    config = write_config(directory, train={"device": device, **train})
    ended = pretrain("train", config, "train.steps=12", "train.evaluate_every=6", "train.checkpoint_every=4")
    assert ended.returncode == 0, ended.stderr
    return curve(directory / "run")


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_float32_on_cuda_has_the_curve_of_the_cpu(recompute, tmp_path):
    sections = {"steps": 12, "global_batch_size": 4, "micro_batch_size": 2, "evaluate_samples": 8}
    on_cpu = curve_on(tmp_path / "cpu", "cpu", **sections)
    on_cuda = curve_on(tmp_path / "cuda", "cuda", recompute=recompute, **sections)
    assert on_cuda.keys() == on_cpu.keys()
    for step, figures in on_cpu.items():
        # float32 sums in another order, carried through twelve steps of Adam.
        assert on_cuda[step] == pytest.approx(figures, rel=1e-3), f"step {step}"


def test_bfloat16_on_cuda_stays_close_to_float32_on_the_cpu(tmp_path):
    sections = {"steps": 12, "global_batch_size": 4, "micro_batch_size": 2, "evaluate_samples": 8}
    on_cpu = curve_on(tmp_path / "cpu", "cpu", **sections)
    on_cuda = curve_on(tmp_path / "cuda", "cuda", precision="bfloat16", **sections)
    for step, (loss, _) in on_cpu.items():
        assert on_cuda[step][0] == pytest.approx(loss, rel=2e-2), f"step {step}"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_curve_of_the_cpu(family, tmp_path):
    curves = []
    for device in ("cpu", "cuda"):
        overrides = (f"run.directory={tmp_path / device}", f"train.device={device}", "parallel.data=1")
        ended = pretrain(
            "train", CONFIGS / f"runs/{family}_tiny.yaml", *overrides, "train.steps=6", "schedule.warmup_steps=2"
        )
        assert ended.returncode == 0, ended.stderr
        curves.append(curve(tmp_path / device))
    on_cpu, on_cuda = curves
    assert on_cpu.keys() == on_cuda.keys()
    for step, (loss, norm) in on_cpu.items():
        # float32 sums in another order; a token whose two best experts are as good as equal may change between them.
        assert on_cuda[step][0] == pytest.approx(loss, rel=1e-3), f"step {step}"
        assert on_cuda[step][1] == pytest.approx(norm, rel=2e-2), f"step {step}"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_resumed_run_has_the_curve_of_the_unbroken_one(precision, tmp_path):
    sections = {"steps": 12, "global_batch_size": 4, "micro_batch_size": 2, "precision": precision}
    whole = curve_on(tmp_path, "cuda", **sections)
    for path in list_checkpoints(tmp_path / "run" / "checkpoints"):
        if int(path.name.removeprefix("step-")) > 4:
            shutil.rmtree(path)
    resumed = curve_on(tmp_path, "cuda", **sections)
    assert resumed.keys() == whole.keys()
    for step, figures in whole.items():
        # Sums by atomic additions have no fixed order on a GPU.
        assert resumed[step] == pytest.approx(figures, rel=1e-4 if precision == "float32" else 1e-2), f"step {step}"
