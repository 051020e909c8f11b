"""The command in processes of its own: killed, stopped by signals, started by torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from pretrain.checkpoint import list_checkpoints
from pretrain.errors import EXIT_STOPPED_BY_SIGNAL
from tests.runs import (
    Running,
    assert_same_curve,
    curve,
    environment,
    pretrain,
    pretrain_anew,
    pretrain_command,
    started,
    write_config,
)

# Long enough to be still running when it is told to stop.
MANY_STEPS = 100_000


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    directory = tmp_path_factory.mktemp("unbroken")
    config = write_config(directory, schedule={"type": "constant"})
    ended = pretrain_anew("train", config)
    assert ended.returncode == 0, ended.stderr
    return curve(directory / "run")


def wait_for_step(process, step):
    """Until a running process has printed its figures of ``step``."""
    output = []
    for line in process.stdout:
        output.append(line)
        if line.startswith(f"step {step}/"):
            return
    raise AssertionError("the run ended before that step:\n" + "".join([*output, process.stderr.read()]))


def test_killed_run_resumes_to_the_same_curve(tmp_path, unbroken):
    config = write_config(tmp_path, schedule={"type": "constant"})
    with Running("pretrain", "train", config, f"train.steps={MANY_STEPS}") as process:
        wait_for_step(process, 6)
        process.send_signal(signal.SIGKILL)
        assert process.finish().returncode == -signal.SIGKILL
    resumed = pretrain("train", config, "train.steps=12")
    assert resumed.returncode == 0, resumed.stderr
    kept = curve(tmp_path / "run")
    # How far the killed run had got by then is chance; what is kept of it never goes beyond its last save.
    assert kept == {**unbroken, **{step: kept[step] for step in kept if step > 12}}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_finishes_the_step_saves_and_exits_with_its_code(number, tmp_path):
    config = write_config(tmp_path)
    overrides = f"train.steps={MANY_STEPS}", "train.checkpoint_every=0"
    with Running("pretrain", "train", config, *overrides) as process:
        wait_for_step(process, 2)
        process.send_signal(number)
        ended = process.finish()
    assert ended.returncode == EXIT_STOPPED_BY_SIGNAL, ended.stderr
    assert "stopped by a signal" in ended.stdout + ended.stderr
    last = max(curve(tmp_path / "run"))
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == [f"step-{last:08}"]


def test_torchrun_trains_and_the_commands_read_the_run(tmp_path, unbroken):
    config = write_config(tmp_path, schedule={"type": "constant"})
    ended = pretrain_anew("train", config, processes=2)
    assert ended.returncode == 0, ended.stderr
    assert_same_curve(curve(tmp_path / "run"), unbroken)
    run = tmp_path / "run"
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
    ]
    evaluated = pretrain("evaluate", run, "--samples", 8, "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    figures = json.loads(evaluated.stdout)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # The same samples, in other micro-batches and on one process.
    assert figures["nats_per_token"] == pytest.approx(lines[-1]["held_out_loss"], rel=1e-5)
    assert figures["bits_per_byte"] == pytest.approx(lines[-1]["held_out_bits_per_byte"], rel=1e-5)
    assert 0 < figures["bigram_bits_per_byte"] < 8
    assert pretrain("checkpoint", "verify", run).returncode == 0
    assert pretrain("report", run).returncode == 0
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_one_rank_of_two_is_killed_and_the_launcher_starts_both_again(tmp_path, unbroken):
    config = write_config(tmp_path, schedule={"type": "constant"})
    command = pretrain_command("train", config, "train.checkpoint_every=2", processes=2)
    command[3:3] = ["--max-restarts", "1"]
    (tmp_path / "sitecustomize.py").write_text(_KILLS_A_RANK.format(marker=str(tmp_path / "killed")))
    kills = environment() | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}"}
    # Or the launcher gives the second start the addresses of the first, which nobody answers at.
    kills |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    ended = subprocess.run(command, env=kills, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "killed").exists() and "resumed from" in ended.stdout
    assert_same_curve(curve(tmp_path / "run"), unbroken)


# Python reads it when it starts: the second rank kills itself, once, when step 7 begins.
_KILLS_A_RANK = """
import os, signal, sys
from pathlib import Path

marker = Path({marker!r})
if os.environ.get("RANK") == "1" and not marker.exists():
    import pretrain.trainer as module

    read_step = module.Trainer.read_step

    def killed(self):
        if self.position.step == 6:
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return read_step(self)

    module.Trainer.read_step = killed
"""


def test_torchrun_passes_a_stop_on(tmp_path):
    config = write_config(tmp_path)
    command = pretrain_command("train", config, f"train.steps={MANY_STEPS}", processes=2)
    pipe = subprocess.PIPE
    with started(command, env=environment(), stdout=pipe, stderr=pipe) as process:
        wait_for_step(process, 2)
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=120)
    assert "stopped by a signal" in output + errors
    last = max(curve(tmp_path / "run"))
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == f"step-{last:08}"
