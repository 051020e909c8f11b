"""The same run on a CUDA device: Triton kernels, the same curve as on the CPU."""

from __future__ import annotations

import pytest

from tests.runs import curve, pretrain, write_config

pytestmark = pytest.mark.gpu


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
