"""A loss spike is noticed; a rollback goes on as if the samples of the spike had never been there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.order import first_of_last, merged, sample_indices
from pretrain.checkpoint import CheckpointReader, list_checkpoints
from pretrain.checkpoint.rollback import ROLLBACKS_FILE, finish_rollbacks, read_rollbacks
from pretrain.config import parse_config
from pretrain.config.spikes import SpikesConfig
from pretrain.errors import InputError
from pretrain.observe.spikes import SpikeDetector
from tests.runs import curve, raw_config, write_corpus

PROGRAMS = "tests.training.programs"
SPIKES = {"action": "rollback", "window": 8, "threshold": 1.0, "margin": 1}
# Of the eighth step; with a margin of one, those of the seventh go too.
POISONED, LEFT_OUT = [28, 29, 30, 31], [24, 32]
STREAMED = ["text files", "text files in whole", "hub"]
LAYOUTS = {"single": (1, {"zero": 1}), "pipeline2": (2, {"pipeline": 2, "zero": 1}), "data2": (2, {"zero": 2})}


def raw_run(directory, layout, **train):
    raw = raw_config(directory, parallel=LAYOUTS[layout][1], train={"steps": 10, "checkpoint_every": 2, **train})
    return raw | {"schedule": {"type": "constant"}}


@pytest.fixture(scope="module")
def rolled_back(worker_pools, tmp_path_factory):
    """Directory, trained samples of each rank and output of a run with a spike that it went back from."""
    cache = {}

    def run(layout):
        if layout not in cache:
            directory = tmp_path_factory.mktemp(layout)
            write_corpus(directory / "corpus")
            raw = raw_run(directory, layout, spikes=SPIKES)
            pool = worker_pools(LAYOUTS[layout][0])
            cache[layout] = directory, pool.run(PROGRAMS, "run_with_poison", raw=raw, poisoned=POISONED)
        return cache[layout]

    return run


@pytest.mark.parametrize("layout", ["single", "data2", pytest.param("pipeline2", marks=pytest.mark.slow)])
def test_the_run_goes_on_as_if_it_had_never_had_the_samples(layout, rolled_back, worker_pools, tmp_path):
    directory, answers = rolled_back(layout)
    (done,) = read_rollbacks(directory / "run")
    assert (done.spike_step, done.back_to_step, [done.first_sample, done.end_sample]) == (8, 6, LEFT_OUT)
    assert done.loss > 2 * done.median / 3
    assert "is a spike" in answers[0][1] and "leaves out samples 24 to 31" in answers[0][1]
    # Steps 1 to 8, the spike; then 7 to 10 behind what is left out. Stages share samples, replicas split them.
    replicas = answers if layout == "data2" else answers[:1]
    steps = [sorted(sum(parts, [])) for parts in zip(*(trained for trained, _ in replicas), strict=True)]
    firsts = [*range(0, 32, 4), *range(32, 48, 4)]
    assert steps == [list(range(first, first + 4)) for first in firsts]

    write_corpus(tmp_path / "corpus")
    raw = raw_run(tmp_path, layout)
    worker_pools(LAYOUTS[layout][0]).run(PROGRAMS, "run_without", raw=raw, left_out=[tuple(LEFT_OUT)])
    assert curve(directory / "run") == curve(tmp_path / "run")


def streamed(directory, kind):
    """A data section whose samples are tokenized while the run reads them, and its files."""
    texts = [path.read_text() for path in sorted(write_corpus(directory / "corpus").iterdir())]
    # So few documents that they are read through more than once where they are the only ones.
    few = [{"text": text[:80]} for text in texts[:16]]
    (directory / "corpus.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in few))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(few), directory / "few.parquet")
    files = {"type": "text_files", "path": str(directory / "corpus"), "pattern": "*.txt"}
    lines = {"type": "jsonl", "path": str(directory / "corpus.jsonl")}
    rows = {"type": "huggingface", "path": "parquet", "data_files": str(directory / "few.parquet")}
    mixture = {"files": {"source": files, "weight": 1.0}, "lines": {"source": lines, "weight": 2.0}}
    weights = [{"from_tokens": 5 * 4 * 32, "weights": {"files": 3.0, "lines": 1.0}}]
    data = {
        "text files": {"source": files},
        "text files in whole": {"source": files, "packing": "best_fit"},
        "hub": {"source": rows},
        "mixture": {"source": None, "mixture": mixture, "curriculum": weights, "packing": "best_fit"},
    }[kind]
    return data | {"stream": {"shuffle_documents": 3, "workers": 0}}


@pytest.mark.parametrize("kind", ["mixture", *(pytest.param(kind, marks=pytest.mark.slow) for kind in STREAMED)])
def test_streams_go_on_as_if_they_had_never_had_the_samples(kind, worker_pools, tmp_path):
    """Behind the rollback, and behind a start anew from a checkpoint that comes after it."""
    pool, runs = worker_pools(1), {}
    for name in ("rolled_back", "without"):
        directory = tmp_path / name
        directory.mkdir()
        raw = raw_run(directory, "single", spikes=SPIKES)
        raw["data"] |= streamed(directory, kind)
        runs[name] = raw
    pool.run(PROGRAMS, "run_with_poison", raw=runs["rolled_back"], poisoned=POISONED)
    (done,) = read_rollbacks(tmp_path / "rolled_back" / "run")
    assert [done.first_sample, done.end_sample] == LEFT_OUT
    pool.run(PROGRAMS, "run_without", raw=runs["without"], left_out=[tuple(LEFT_OUT)])
    whole = curve(tmp_path / "without" / "run")
    if kind == "hub":
        newest = list_checkpoints(tmp_path / "without" / "run" / "checkpoints")[-1]
        assert any(mark["epoch"] > 0 for mark in CheckpointReader(newest).state["bookmarks"].values())
    assert curve(tmp_path / "rolled_back" / "run") == whole
    shutil.rmtree(tmp_path / "rolled_back" / "run" / "checkpoints" / "step-00000010")
    ((trained, _),) = pool.run(PROGRAMS, "run_with_poison", raw=runs["rolled_back"], poisoned=POISONED)
    assert trained == [list(range(40, 44)), list(range(44, 48))]
    assert curve(tmp_path / "rolled_back" / "run") == whole


@pytest.mark.parametrize("file", [True, False], ids=["by its file", "by the checkpoint alone"])
def test_a_resume_leaves_out_the_same(file, rolled_back, worker_pools, tmp_path):
    whole, _ = rolled_back("single")
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    for path in list_checkpoints(tmp_path / "run" / "checkpoints"):
        # Without the file only a checkpoint from behind the rollback knows of it.
        if path.name > ("step-00000006" if file else "step-00000008"):
            shutil.rmtree(path)
    if not file:
        (tmp_path / "run" / ROLLBACKS_FILE).unlink()
    raw = raw_run(tmp_path, "single", spikes=SPIKES)
    ((trained, _),) = worker_pools(1).run(PROGRAMS, "run_with_poison", raw=raw, poisoned=POISONED)
    assert trained[-2:] == [list(range(40, 44)), list(range(44, 48))] and len(trained) == (4 if file else 2)
    assert curve(tmp_path / "run") == curve(whole / "run")


def test_a_rollback_that_was_killed_halfway_is_finished(rolled_back, tmp_path):
    """The file is there, and checkpoints that have seen the samples still are."""
    whole, _ = rolled_back("single")
    shutil.copytree(whole / "run", tmp_path / "run")
    run = tmp_path / "run"
    before = [path.name for path in list_checkpoints(run / "checkpoints")]
    assert finish_rollbacks(run, run / "checkpoints") == [tuple(LEFT_OUT)]
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == before, "all of them left out the samples"
    entries = json.loads((run / ROLLBACKS_FILE).read_text())
    again = entries[0] | {"spike_step": 9, "back_to_step": 8, "first_sample": 40, "end_sample": 44}
    (run / ROLLBACKS_FILE).write_text(json.dumps([*entries, again]))
    assert finish_rollbacks(run, run / "checkpoints") == [tuple(LEFT_OUT), (40, 44)]
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == before[:-1], "step 8 had read 40 samples"


def test_a_spike_is_only_reported_unless_asked(worker_pools, tmp_path):
    write_corpus(tmp_path / "corpus")
    raw = raw_run(tmp_path, "single", spikes=SPIKES | {"action": "report"})
    ((trained, said),) = worker_pools(1).run(PROGRAMS, "run_with_poison", raw=raw, poisoned=POISONED)
    assert "step 8: the loss" in said and "is a spike" in said
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line.get("spike")] == [8]
    assert len(trained) == 10 and not (tmp_path / "run" / ROLLBACKS_FILE).exists()


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / ROLLBACKS_FILE).write_text('[{"spike_step": 3}]')
    with pytest.raises(InputError, match="which samples the run leaves out"):
        finish_rollbacks(tmp_path, tmp_path / "checkpoints")


REFUSED = {
    "states go on": ({"carry_state": True}, {}, "does not go with train.carry_state"),
    "no checkpoints": ({"checkpoint_every": 0}, {}, "set train.checkpoint_every"),
    "too few kept": ({"keep_last": 2}, {"margin": 3}, "goes back further than the checkpoints"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_rollback_does_not_go_with(case):
    train, spikes, expected = REFUSED[case]
    raw = raw_config(Path("unused"), train={"checkpoint_every": 2, "spikes": SPIKES | spikes, **train})
    with pytest.raises(InputError, match=expected):
        parse_config(raw, "test")
    raw["train"]["spikes"]["action"] = "report"
    assert parse_config(raw, "test").train.spikes.action == "report"


def test_losses_are_compared_with_the_median_of_the_window():
    detector = SpikeDetector(SpikesConfig(window=8, threshold=6.0, least_increase=0.2))
    assert [detector.take(loss) for loss in (9.0, 2.0, 2.1)] == [None] * 3, "too few to compare with"
    assert detector.take(1.9) is None
    found = detector.take(4.0)
    assert found is not None and found.median == pytest.approx(2.05)
    assert detector.take(float("nan")) is None and len(detector.losses) == 5
    steady = SpikeDetector(SpikesConfig(window=8, least_increase=0.2), [2.0] * 8)
    assert steady.take(2.19) is None, "without noise the least increase is what counts"
    assert steady.take(2.21) is not None
    assert [steady.take(3.0) is not None for _ in range(8)] == [True] * 3 + [False] * 5, "in the end it is normal"


RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=4).map(
    lambda pairs: merged([(first, first + size) for first, size in pairs])
)


@given(RANGES, st.integers(0, 60), st.integers(1, 20))
def test_batches_step_over_what_is_left_out(ranges, first, count):
    allowed = [i for i in range(300) if not any(a <= i < b for a, b in ranges)]
    found = sample_indices(first, count, ranges)
    assert found == [i for i in allowed if i >= first][:count]
    back = [i for i in allowed if i < found[-1] + 1][-count:]
    assert sample_indices(first_of_last(found[-1] + 1, count, ranges), len(back), ranges) == back
