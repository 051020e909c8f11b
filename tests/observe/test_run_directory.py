"""The run directory: what may start in it, what may go on in it, and who else may not."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint.directory import CHECKPOINTS_DIRECTORY
from pretrain.config import Config, load_config
from pretrain.errors import InputError
from pretrain.observe.run_directory import RunDirectory, changed_keys
from tests.configurations import tiny_config


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "first"


def start(path: Path, config: Config, resume: str = "auto") -> dict[str, tuple[Any, Any]]:
    """One job that prepares the directory and ends."""
    run = RunDirectory(path)
    try:
        return run.prepare(config, resume)
    finally:
        run.release()


def start_and_log(path: Path, config: Config) -> None:
    start(path, config)
    RunDirectory(path).metrics_file.write_text('{"step": 1}\n')


def test_a_new_directory_holds_the_configuration_and_nothing_unexpected(path: Path) -> None:
    config = tiny_config(str(path))
    assert start(path, config) == {}
    run = RunDirectory(path)
    assert sorted(entry.name for entry in path.iterdir()) == ["checkpoints", "config.yaml", "environment.json"]
    assert load_config(run.config_file) == config
    assert json.loads(run.environment_file.read_text())["packages"]["torch"]
    assert run.checkpoints.name == CHECKPOINTS_DIRECTORY and run.checkpoints.is_dir()


def test_an_empty_directory_is_as_good_as_a_new_one(tmp_path: Path) -> None:
    assert start(tmp_path, tiny_config(), "never") == {}


def test_never_refuses_a_directory_that_holds_a_run(path: Path) -> None:
    start(path, tiny_config())
    with pytest.raises(InputError, match="already holds a run; continue it with --resume auto, or give another"):
        start(path, tiny_config(), "never")


def test_a_directory_of_something_else_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match=r"not empty \(thesis\.tex\) and has no config\.yaml"):
        start(tmp_path, tiny_config())
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(InputError, match=r"run\.directory .* cannot be used"):
        start(tmp_path / "run", tiny_config())


@pytest.mark.parametrize(
    ("changes", "key", "old", "new"),
    [
        ({"model": {"hidden_size": 128}}, "model.hidden_size", "64", "128"),
        ({"data": {"sequence_length": 32}}, "data.sequence_length", "16", "32"),
        ({"data": {"held_out_fraction": 0.1}}, "data.held_out_fraction", "0.02", "0.1"),
        (
            {"data": {"tokenizer": {"type": "sentencepiece", "path": "m"}}},
            "data.tokenizer.type",
            '"bytes"',
            '"sentencepiece"',
        ),
        ({"train": {"seed": 7}}, "train.seed", "0", "7"),
    ],
)
def test_another_model_or_other_data_are_refused_by_name(
    path: Path, changes: dict[str, Any], key: str, old: str, new: str
) -> None:
    original = tiny_config()
    start_and_log(path, original)
    with pytest.raises(InputError) as caught:
        start(path, tiny_config(**changes))
    assert f"holds a run with {key}={old}, but the configuration says {key}={new}" in str(caught.value)
    assert load_config(path / "config.yaml") == original, "a refused start must change nothing"


def test_a_compatible_change_is_written_returned_and_remembered(path: Path) -> None:
    start_and_log(path, tiny_config())
    longer = tiny_config(train={"steps": 50}, wandb={"mode": "offline"})
    changed = start(path, longer)
    assert changed["train.steps"] == (5, 50)
    assert changed["wandb"] == (None, longer.model_dump(mode="json")["wandb"])
    assert set(changed) == {"train.steps", "wandb"}
    assert load_config(path / "config.yaml") == longer
    environment = json.loads((path / "environment.json").read_text())
    assert environment["changed_configuration"]["train.steps"] == {"old": 5, "new": 50}
    assert len(environment["earlier_starts"]) == 1
    start(path, longer)
    environment = json.loads((path / "environment.json").read_text())
    assert environment["changed_configuration"] == {}
    assert [bool(earlier["changed_configuration"]) for earlier in environment["earlier_starts"]] == [False, True]


def test_data_may_move_to_another_path(path: Path) -> None:
    def config(where: str) -> Config:
        return tiny_config(data={"source": {"type": "text_files", "path": where}})

    start_and_log(path, config("here"))
    assert start(path, config("there")) == {"data.source.path": ("here", "there")}


def test_a_start_that_never_made_a_step_binds_nobody(path: Path) -> None:
    start(path, tiny_config())
    assert start(path, tiny_config(model={"hidden_size": 128})) == {"model.hidden_size": (64, 128)}


def test_a_checkpoint_alone_binds_the_run(path: Path) -> None:
    start(path, tiny_config())
    (path / "checkpoints" / "step-00000001").mkdir()
    with pytest.raises(InputError, match=r"model\.hidden_size"):
        start(path, tiny_config(model={"hidden_size": 128}))


def test_resuming_from_a_path_takes_own_checkpoints_and_refuses_those_of_another_run(path: Path) -> None:
    start_and_log(path, tiny_config())
    assert start(path, tiny_config(), str(path / "checkpoints" / "step-00000001")) == {}
    with pytest.raises(InputError, match="is a checkpoint of another"):
        start(path, tiny_config(), str(path.parent / "second" / "checkpoints" / "step-00000001"))
    assert start(path.parent / "third", tiny_config(), str(path)) == {}, "a new directory may start from anywhere"


def test_a_configuration_of_another_schema_is_compared_as_it_stands(path: Path) -> None:
    start_and_log(path, tiny_config())
    stored = path / "config.yaml"
    stored.write_text(stored.read_text().replace("  hidden_size: 64\n", "  hidden_size: 64\n  gone_since: 3\n"))
    with pytest.raises(InputError, match=r"model\.gone_since=3"):
        start(path, tiny_config())


@pytest.mark.parametrize("content", ["run: [", "just text", ""])
def test_a_damaged_configuration_is_named(path: Path, content: str) -> None:
    start_and_log(path, tiny_config())
    (path / "config.yaml").write_text(content)
    with pytest.raises(InputError, match=r"config\.yaml is damaged"):
        start(path, tiny_config())


def test_what_a_killed_start_left_is_cleared_away(path: Path) -> None:
    path.mkdir(parents=True)
    (path / "config.yaml.tmp").write_text("half")
    start(path, tiny_config())
    assert not (path / "config.yaml.tmp").exists()


def test_a_second_job_is_refused_until_the_first_one_ends(path: Path) -> None:
    first = RunDirectory(path)
    first.prepare(tiny_config(), "auto")
    program = (
        "import fcntl, os, sys\n"
        "descriptor = os.open(sys.argv[1], os.O_RDONLY)\n"
        "try: fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "except BlockingIOError: print('refused')\n"
        "else: print('taken')\n"
    )

    def other_process() -> str:
        return subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True).stdout.strip()

    assert other_process() == "refused"
    with pytest.raises(InputError, match="in use by another job"):
        RunDirectory(path).prepare(tiny_config(), "auto")
    first.prepare(tiny_config(), "auto")  # its own lock does not stand in its way
    first.release()
    assert other_process() == "taken"


_HOLDS_A_RUN = """
import sys, time
from pretrain.observe.run_directory import RunDirectory
from tests.configurations import tiny_config
run = RunDirectory(sys.argv[1])
run.prepare(tiny_config(), "auto")
print("ready", flush=True)
time.sleep(600)
"""


def test_two_live_jobs_are_refused_and_the_lock_of_a_dead_one_is_taken_over(path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-c", _HOLDS_A_RUN, str(path)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(InputError, match="in use by another job; wait until it ends or stop it"):
            start(path, tiny_config())
    finally:
        process.kill()
        process.communicate()
    # It had no time to give anything back.
    assert start(path, tiny_config()) == {}


# Every key of a run, by whether a resume may change it; what may not is named when it is refused.
SAFE_TO_CHANGE = {
    "run.directory",
    *(f"parallel.{name}" for name in ("tensor", "sequence", "pipeline", "context", "context_scheme", "expert", "data")),
    *(f"parallel.{name}" for name in ("layers_per_stage", "zero")),
    *(f"optimizer.{name}" for name in ("type", "learning_rate", "betas", "epsilon", "weight_decay", "gradient_clip")),
    *(f"schedule.{name}" for name in ("type", "warmup_steps", "decay_steps", "final_fraction")),
    *(f"train.{name}" for name in ("steps", "global_batch_size", "micro_batch_size", "device", "precision")),
    *(
        f"train.{name}"
        for name in ("recompute", "loss_chunk_size", "evaluate_every", "evaluate_samples", "checkpoint_every")
    ),
    *(f"train.{name}" for name in ("checkpoint_mode", "keep_last", "keep_every", "log_every", "hang_seconds")),
    "train.max_skipped_steps",
    "train.spikes",
    "observe",
    "wandb",
    "tensorboard",
    "launch",
    "distillation",
    *(f"data.{name}" for name in ("cache_directory", "mixture", "curriculum", "source.path", "source.path_prefix")),
    "data.source.held_out_path_prefix",
}


def keys_of(section: dict[str, Any], above: str = "") -> list[str]:
    return [
        inner
        for key, value in section.items()
        for inner in (keys_of(value, f"{above}{key}.") if isinstance(value, dict) and value else [f"{above}{key}"])
    ]


def test_every_key_is_refused_by_name_or_known_to_be_safe(path: Path) -> None:
    config = tiny_config(data={"source": {"type": "text_files", "path": "here"}})
    start_and_log(path, config)
    run, refused, allowed = RunDirectory(path), set(), set()
    for key in keys_of(config.model_dump(mode="json")):
        try:
            run._refuse_another_run({key: ("before", "now")}, "auto", None)
        except InputError as error:
            assert f'{key}="before", but the configuration says {key}="now"' in str(error)
            refused.add(key)
        else:
            allowed.add(key)
    assert allowed <= SAFE_TO_CHANGE and len(allowed) > 30
    assert not refused & SAFE_TO_CHANGE
    # The model, the data, and what decides the order of samples.
    assert {key.split(".")[0] for key in refused} == {"model", "data", "train"}
    assert {key for key in refused if key.startswith("train.")} == {"train.seed", "train.carry_state"}


def test_a_forked_worker_does_not_keep_the_lock(path: Path) -> None:
    run = RunDirectory(path)
    run.prepare(tiny_config(), "auto")
    may_end, end = os.pipe()
    ready, is_ready = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(is_ready, b"r")
        os.read(may_end, 1)
        os._exit(0)
    try:
        os.read(ready, 1)
        run.release()
        assert start(path, tiny_config()) == {}, "the worker is alive, and must not stand in the way"
    finally:
        os.write(end, b"e")
        os.waitpid(child, 0)
        for descriptor in (may_end, end, ready, is_ready):
            os.close(descriptor)


def test_what_a_run_began_with_is_remembered_until_it_has_a_checkpoint(path: Path) -> None:
    imported = path.parent / "imported" / "step-00000000"
    run = RunDirectory(path)
    run.prepare(tiny_config(), str(imported), imported)
    run.release()
    # A save that was cut short is no checkpoint, and the same start may be made again.
    (path / "checkpoints" / "tmp-step-00000000").mkdir()
    run.metrics_file.write_text('{"step": 1}\n')
    for resume, start_from in (("auto", None), (str(imported), imported)):
        again = RunDirectory(path)
        assert again.prepare(tiny_config(), resume, start_from) == {} and again.began_with() == imported.resolve()
        again.release()
    (path / "checkpoints" / "step-00000000").mkdir()
    with pytest.raises(InputError, match="is a checkpoint of another; continue this one with --resume auto"):
        RunDirectory(path).prepare(tiny_config(), str(imported), imported)


def test_a_start_killed_before_it_wrote_its_configuration_is_no_run_yet(path: Path) -> None:
    path.mkdir(parents=True)
    (path / "environment.json").write_text('{"began_with": null}')
    assert start(path, tiny_config()) == {}


def test_a_refused_start_leaves_the_directory_free(path: Path) -> None:
    start_and_log(path, tiny_config())
    refused = RunDirectory(path)
    with pytest.raises(InputError):
        refused.prepare(tiny_config(), "never")
    assert start(path, tiny_config()) == {}


def test_a_file_system_without_locks_is_reported_and_used(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", fail)
    assert start(path, tiny_config()) == {}
    assert "cannot lock a directory" in caplog.text


def test_changed_keys_are_dotted_and_hold_both_values() -> None:
    old = {"a": {"b": 1, "c": [1, 2]}, "d": None, "gone": 0}
    new = {"a": {"b": 2, "c": [1, 2]}, "d": {"e": 1}, "added": True}
    expected = {"a.b": (1, 2), "d": (None, {"e": 1}), "added": (None, True), "gone": (0, None)}
    assert changed_keys(old, new) == expected
    assert list(changed_keys(old, new)) == list(expected)
    assert changed_keys(old, old) == {}
