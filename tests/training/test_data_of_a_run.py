"""Streams, packings and curricula in whole runs: resumed in other layouts, and stopped by data that cannot be read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pretrain.checkpoint import CheckpointReader, list_checkpoints
from tests.runs import assert_same_curve, curve, pretrain, raw_config, write_config, write_corpus

PROGRAMS = "tests.training.programs"
# Processes that tests share may not start others, so the training process tokenizes.
STREAM = {"shuffle_documents": 2, "workers": 0}


@pytest.fixture(scope="module")
def train(worker_pools):
    def run(directory: Path, steps: int, processes: int = 1, parallel: dict | None = None, **data: object) -> list:
        if not (directory / "corpus").exists():
            write_corpus(directory / "corpus")
        raw = raw_config(directory, data=data, parallel=parallel or {})
        # The schedule must not know that the run is cut.
        raw["schedule"] = {"type": "constant"}
        raw["train"]["steps"] = steps
        return worker_pools(processes).run(PROGRAMS, "run_training", raw=raw)

    return run


def assert_close(run: Path, whole: Path) -> None:
    found, expected = curve(run), curve(whole)
    assert_same_curve(found, expected)


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_a_stream_resumes_bit_for_bit_and_under_other_layouts(train, tmp_path, packing):
    data = {"stream": STREAM, "packing": packing}
    train(tmp_path / "whole", 12, **data)
    train(tmp_path / "cut", 5, **data)
    train(tmp_path / "cut", 12, **data)
    assert curve(tmp_path / "cut" / "run") == curve(tmp_path / "whole" / "run")
    newest = list_checkpoints(tmp_path / "cut" / "run" / "checkpoints")[-1]
    bookmark = CheckpointReader(newest).state["bookmarks"]["source"]
    assert bookmark["number"] + bookmark["epoch"] > 0, "the bookmark is the source's beginning"
    train(tmp_path / "moved", 3, processes=2, **data)
    train(tmp_path / "moved", 7, processes=2, parallel={"pipeline": 2}, **data)
    train(tmp_path / "moved", 12, **data)
    assert_close(tmp_path / "moved" / "run", tmp_path / "whole" / "run")


def test_whole_documents_train_in_every_layout(train, tmp_path):
    train(tmp_path / "whole", 6, packing="best_fit")
    train(tmp_path / "tensor", 6, processes=2, parallel={"tensor": 2, "sequence": True}, packing="best_fit")
    assert_close(tmp_path / "tensor" / "run", tmp_path / "whole" / "run")
    assert curve(tmp_path / "whole" / "run")[6][0] < curve(tmp_path / "whole" / "run")[1][0]


def test_a_curriculum_of_sequence_lengths(train, tmp_path):
    """The data's order stays: only how far the state is carried changes, at the tokens that the curriculum says."""
    step = 4 * 32
    curriculum = [
        {"from_tokens": 0, "sequence_length": 8},
        {"from_tokens": 4 * step, "sequence_length": 16},
        {"from_tokens": 8 * step, "sequence_length": 32},
    ]
    train(tmp_path / "whole", 12, curriculum=curriculum)
    train(tmp_path / "moved", 6, processes=2, parallel={"pipeline": 2}, curriculum=curriculum)
    train(tmp_path / "moved", 12, processes=2, parallel={"tensor": 2, "sequence": True}, curriculum=curriculum)
    assert_close(tmp_path / "moved" / "run", tmp_path / "whole" / "run")
    train(tmp_path / "long", 12)
    shorter, longer = curve(tmp_path / "whole" / "run"), curve(tmp_path / "long" / "run")
    # The same tokens, seen with less before them.
    assert shorter[1][0] != longer[1][0] and shorter[1][0] == pytest.approx(longer[1][0], rel=1e-2)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["tokens"] for line in lines] == [step * (number + 1) for number in range(12)]


def test_a_sequence_length_that_does_not_divide_over_ranks_is_refused(tmp_path):
    phases = "data.curriculum=[{from_tokens: 0, sequence_length: 1}]"
    config = write_config(tmp_path)
    done = pretrain("plan", config, phases)
    assert done.returncode == 2 and "greater than or equal to 2" in done.stderr
    done = pretrain("plan", config, phases.replace(" 1}", " 5}"))
    assert done.returncode == 2 and "sequence_length 5 must divide data.sequence_length 32" in done.stderr
    layout = ["parallel.tensor=4", "parallel.sequence=true", "data.curriculum=[{from_tokens: 9, sequence_length: 2}]"]
    done = pretrain("plan", config, *layout)
    assert done.returncode == 2 and "data.curriculum: sequence_length=2 is not divisible by" in done.stderr


@pytest.mark.parametrize("ranks", [1, 2])
def test_data_that_cannot_be_read_on_stops_the_run_with_its_steps_saved(tmp_path, ranks):
    """A bad record in the middle of a stream; once it is mended the run goes on as if nothing had been."""
    texts = [path.read_text() for path in sorted(write_corpus(tmp_path / "texts").iterdir())]
    lines = [json.dumps({"text": text}) for text in texts]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(lines) + "\n")
    data = {
        "source": {"type": "jsonl", "path": str(corpus)},
        "sequence_length": 128,
        "stream": {"shuffle_documents": 2, "workers": 1, "held_out_samples": 1},
    }
    (tmp_path / "corpus").mkdir()
    whole = write_config(tmp_path, run={"directory": str(tmp_path / "whole")}, data=data)
    assert pretrain("train", whole).returncode == 0
    config = write_config(tmp_path, data=data, train={"checkpoint_every": 0})
    # Damaged without a change of size or time, as a disk would.
    damaged = corpus.read_text().replace(lines[10], "{" * len(lines[10]))
    _replace_in_place(corpus, damaged)
    stopped = pretrain("train", config, ranks=ranks)
    assert stopped.returncode == 2, stopped.stderr
    assert f"{corpus} line 11 is not valid JSON" in stopped.stderr
    (saved,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert 0 < CheckpointReader(saved).state["position"]["step"] < 12
    assert f"saved {saved}" in stopped.stdout + stopped.stderr
    _replace_in_place(corpus, "\n".join(lines) + "\n")
    assert pretrain("train", config, ranks=ranks).returncode == 0
    assert_close(tmp_path / "run", tmp_path / "whole")


def _replace_in_place(path: Path, text: str) -> None:
    before = path.stat()
    path.write_text(text)
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
