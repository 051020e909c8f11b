"""Runs whose checkpoints are written while they train: the same checkpoints, and nothing that goes wrong ends them."""

from __future__ import annotations

import json
import signal

import pytest
import yaml

from pretrain.checkpoint import list_checkpoints, newest_checkpoint
from tests.runs import Running, curve, raw_config, write_corpus

PROGRAMS = "tests.training.saving_programs"
MODES = ("asynchronous", "synchronous")


def run_config(directory, *, parallel=None, **train):
    """A run of 12 steps that saves steps 4, 8 and 12."""
    if not (directory / "corpus").exists():
        write_corpus(directory / "corpus")
    raw = raw_config(directory, parallel=parallel or {"zero": 0}, train=train)
    # The schedule must not know that a run is cut.
    return raw | {"schedule": {"type": "constant"}}


def names(directory):
    return sorted(path.name for path in (directory / "run" / "checkpoints").iterdir())


def failed_checkpoints(directory):
    lines = [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line.get("failed_checkpoints", 0) for line in lines]


def test_both_modes_write_the_same_checkpoints(worker_pools, tmp_path):
    """Weights, moments and the states of rows that go on, of two data-parallel ranks under ZeRO-2."""
    model = raw_config(tmp_path)["model"] | {"layers": ["mamba"], "output_logit_soft_cap": None}
    model["blocks"] = {"mamba": {"mixer": {"type": "mamba2", "head_size": 16, "state_size": 8}}}
    for mode in MODES:
        raw = run_config(tmp_path / mode, parallel={"zero": 2}, steps=8, checkpoint_mode=mode, carry_state=True)
        worker_pools(2).run("tests.training.programs", "run_training", raw=raw | {"model": model})
    awaited = list_checkpoints(tmp_path / "synchronous" / "run" / "checkpoints")
    assert [path.name for path in awaited] == ["step-00000004", "step-00000008"]
    assert names(tmp_path / "asynchronous") == names(tmp_path / "synchronous")
    for path in awaited:
        beside = tmp_path / "asynchronous" / path.relative_to(tmp_path / "synchronous")
        files = sorted(file.name for file in path.glob("shard-*"))
        assert files and files == sorted(file.name for file in beside.glob("shard-*"))
        for name in files:
            assert (beside / name).read_bytes() == (path / name).read_bytes(), (path.name, name)
        states = [json.loads((directory / "state.json").read_text()) for directory in (path, beside)]
        assert [state.pop("config")["train"]["checkpoint_mode"] for state in states] == list(reversed(MODES))
        assert states[0] == states[1]
    assert curve(tmp_path / "asynchronous" / "run") == curve(tmp_path / "synchronous" / "run")


def test_training_goes_on_and_the_next_save_waits(worker_pools, tmp_path):
    raw = run_config(tmp_path, keep_last=1)
    ((messages, steps),) = worker_pools(1).run(PROGRAMS, "second_save_waits", raw=raw, held=4)
    assert steps == [5, 6, 7, 8]
    waiting = messages.index("step 8: waiting for the checkpoint before this one, which is still written")
    told = [index for index, text in enumerate(messages) if text.startswith("saved ")]
    assert waiting < told[0] and "step-00000004 (training waited" in messages[told[0]]
    # Pruned when the next was complete, the last one included.
    assert names(tmp_path) == ["step-00000012"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_a_save_leaves_both_checkpoints(number, worker_pools, tmp_path):
    raw = run_config(tmp_path)
    arguments = {"held": 4, "number": int(number)}
    ((stopped, messages),) = worker_pools(1).run(PROGRAMS, "stopped_while_saving", raw=raw, **arguments)
    assert stopped, messages
    checkpoints = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert [path.name for path in checkpoints] == names(tmp_path) == ["step-00000004", "step-00000006"]


def test_a_rank_that_cannot_write_is_reported_and_survived(worker_pools, tmp_path):
    raw = run_config(tmp_path, parallel={"tensor": 2, "zero": 0}, keep_last=1)
    results = worker_pools(2).run(PROGRAMS, "failing_save", raw=raw, failing=8, rank=1)
    assert [ended for _, ended in results] == [None, None]
    (told,) = [text for text in results[0][0] if text.startswith("NOT SAVED")]
    assert "step 8 could not be saved" in told and "rank 1: OSError: [Errno 28] No space left on device" in told
    counted = failed_checkpoints(tmp_path)
    assert counted[:8] == [0] * 8 and counted[-1] == 1 and counted == sorted(counted)
    assert names(tmp_path) == ["step-00000012"]


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(worker_pools, tmp_path):
    raw = run_config(tmp_path, parallel={"tensor": 2, "zero": 0}, keep_last=1)
    results = worker_pools(2).run(PROGRAMS, "failing_save", raw=raw, failing=12, rank=1)
    assert all("step 12 could not be saved" in ended for _, ended in results)
    assert names(tmp_path) == ["step-00000008"], "the one before stays"


def test_ranks_that_lost_each_other_in_a_save_meet_again_in_the_next(worker_pools, tmp_path):
    raw = run_config(tmp_path, parallel={"tensor": 2, "zero": 0})
    results = worker_pools(2).run(PROGRAMS, "broken_group", raw=raw, failing=4)
    assert all(renewed for _, renewed in results)
    (told,) = [text for text in results[0][0] if text.startswith("NOT SAVED")]
    assert "step 4 could not be saved" in told and "Connection reset by peer" in told
    assert names(tmp_path) == ["step-00000008", "step-00000012"]
    assert failed_checkpoints(tmp_path)[-1] == 1


def test_killed_while_a_checkpoint_is_written(worker_pools, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    raw = run_config(whole)
    worker_pools(1).run("tests.training.programs", "run_training", raw=raw)
    config = cut / "config.yaml"
    config.write_text(yaml.safe_dump(run_config(cut, steps=11)))
    output = []
    with Running(PROGRAMS, config) as process:
        for line in process.stdout:
            output.append(line)
            # Training has gone on beside it.
            if {"half of a shard is written\n"} < set(output) and any(text.startswith("step 10/") for text in output):
                break
        process.send_signal(signal.SIGKILL)
        ended = process.finish()
    assert ended.returncode == -signal.SIGKILL, "".join(output) + ended.stderr
    assert names(cut) == ["step-00000004", "tmp-step-00000008"]
    newest = newest_checkpoint(cut / "run" / "checkpoints", verify_checksums=True)
    assert newest is not None and newest.name == "step-00000004"
    worker_pools(1).run("tests.training.programs", "run_training", raw=run_config(cut))
    assert curve(cut / "run") == curve(whole / "run")
    assert names(cut) == names(whole)
    for path in list_checkpoints(whole / "run" / "checkpoints"):
        for file in path.glob("shard-*"):
            beside = cut / "run" / "checkpoints" / path.name / file.name
            assert beside.read_bytes() == file.read_bytes(), (path.name, file.name)


def test_copies_of_the_weights_share_the_writing(worker_pools, tmp_path):
    """Each of two ranks that hold all weights writes about half of them."""
    raw = run_config(tmp_path, parallel={"zero": 0}, steps=1)
    worker_pools(2).run("tests.training.programs", "run_training", raw=raw)
    (path,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    sizes = [file.stat().st_size for file in sorted(path.glob("shard-*"))]
    assert len(sizes) == 2 and max(sizes) < 0.6 * sum(sizes)
