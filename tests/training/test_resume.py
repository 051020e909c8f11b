"""A run that is cut and resumed has the curve of one that was not: bit for bit in its layout, closely in others."""

from __future__ import annotations

import json
import shutil

import pytest

from pretrain.checkpoint import CheckpointReader, list_checkpoints
from tests.runs import assert_same_curve, curve, raw_config, write_corpus

PROGRAMS = "tests.training.programs"

LAYOUTS = {
    "single": (1, {"zero": 1}),
    "single_zero0": (1, {"zero": 0}),
    "tensor2": (2, {"tensor": 2, "sequence": True, "zero": 1}),
    "pipeline2": (2, {"pipeline": 2, "zero": 1}),
    "pipeline2_zero0": (2, {"pipeline": 2, "zero": 0}),
    "data2_zero1": (2, {"zero": 1}),
    "data2_zero2": (2, {"zero": 2}),
    "data2_zero3": (2, {"zero": 3}),
    "context2": (2, {"context": 2, "zero": 1}),
}


@pytest.fixture(scope="module")
def train(worker_pools):
    def run(directory, layout, steps=12, resume="auto", **sections):
        processes, parallel = LAYOUTS[layout]
        raw = raw_config(directory, parallel=parallel, **sections)
        # The schedule must not know that the run is cut.
        raw["schedule"] = {"type": "constant"}
        raw["train"]["steps"] = steps
        return worker_pools(processes).run(PROGRAMS, "run_training", raw=raw, resume=resume)

    return run


@pytest.fixture(scope="module")
def unbroken(train, tmp_path_factory):
    """Directory and curve of an unbroken run, by layout."""
    cache = {}

    def run(layout):
        if layout not in cache:
            directory = tmp_path_factory.mktemp(f"unbroken_{layout}")
            write_corpus(directory / "corpus")
            train(directory, layout)
            cache[layout] = directory
        return cache[layout]

    return run


def cut_after(source, directory, step):
    """A copy of a run as if it had been killed right after ``step`` was saved."""
    shutil.copytree(source, directory, dirs_exist_ok=True)
    for path in list_checkpoints(directory / "run" / "checkpoints"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    return directory


@pytest.mark.parametrize(
    "layout", ["single", "single_zero0", "tensor2", "pipeline2", "data2_zero1", "data2_zero2", "data2_zero3"]
)
def test_same_layout_resumes_bit_for_bit(layout, train, unbroken, tmp_path):
    whole = curve(unbroken(layout) / "run")
    directory = cut_after(unbroken(layout), tmp_path, 4)
    assert train(directory, layout) == [(12, False)] * LAYOUTS[layout][0]
    assert curve(directory / "run") == whole


def test_layout_changes_at_every_resume(train, unbroken, tmp_path):
    """TP2 -> PP2 -> CP2 -> ZeRO-3 DP2 -> one process, against one process all along."""
    whole = curve(unbroken("single") / "run")
    write_corpus(tmp_path / "corpus")
    for layout, until in (("tensor2", 3), ("pipeline2", 5), ("context2", 7), ("data2_zero3", 9), ("single_zero0", 12)):
        train(tmp_path, layout, steps=until)
    moved = curve(tmp_path / "run")
    assert_same_curve(moved, whole)


def test_tied_embeddings_move_between_uneven_stages(train, tmp_path):
    """The copy on the last stage is not saved, and comes back; stages have two layers and one."""
    tied = {"model": raw_config(tmp_path)["model"] | {"tie_embeddings": True, "num_layers": 3}}
    for name, layouts in (
        ("whole", [("single", 8)]),
        ("moved", [("pipeline2", 4), ("single_zero0", 6), ("pipeline2", 8)]),
    ):
        write_corpus(tmp_path / name / "corpus")
        for layout, until in layouts:
            train(tmp_path / name, layout, steps=until, **tied)
    whole, moved = (curve(tmp_path / name / "run") for name in ("whole", "moved"))
    assert_same_curve(moved, whole)


def test_a_vocabulary_that_does_not_divide_is_saved_without_padding(train, tmp_path):
    uneven = {"model": raw_config(tmp_path)["model"] | {"vocab_size": 257, "tie_embeddings": True}}
    for name, layouts in (("whole", [("single", 8)]), ("moved", [("tensor2", 4), ("single", 6), ("tensor2", 8)])):
        write_corpus(tmp_path / name / "corpus")
        for layout, until in layouts:
            train(tmp_path / name, layout, steps=until, **uneven)
    whole, moved = (curve(tmp_path / name / "run") for name in ("whole", "moved"))
    assert_same_curve(moved, whole)
    newest = CheckpointReader(list_checkpoints(tmp_path / "moved" / "run" / "checkpoints")[-1])
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        assert newest.shape("embedding.weight", kind) == (257, 32)


def test_checkpoint_holds_the_same_in_every_layout(unbroken):
    """The first checkpoint of each layout: same names, same values to rounding."""
    reference = CheckpointReader(list_checkpoints(unbroken("single") / "run" / "checkpoints")[0])
    for layout in ("tensor2", "pipeline2", "data2_zero3"):
        other = CheckpointReader(list_checkpoints(unbroken(layout) / "run" / "checkpoints")[0])
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            assert other.names(kind) == reference.names(kind)
            for name in reference.names(kind):
                difference = (other.read(name, kind) - reference.read(name, kind)).abs().max()
                assert difference < 2e-5, (layout, name, kind)


def test_resume_never_refuses_an_old_run_and_a_path_starts_a_new_one(train, unbroken, tmp_path):
    directory = cut_after(unbroken("single"), tmp_path, 4)
    with pytest.raises(AssertionError, match="holds .*run"):
        train(directory, "single", resume="never")
    write_corpus(tmp_path / "second" / "corpus")
    checkpoint = directory / "run" / "checkpoints" / "step-00000004"
    train(tmp_path / "second", "single", resume=str(checkpoint))
    continued = curve(tmp_path / "second" / "run")
    assert continued == {step: figures for step, figures in curve(unbroken("single") / "run").items() if step > 4}


def test_other_data_or_model_is_refused(train, unbroken, tmp_path):
    directory = cut_after(unbroken("single"), tmp_path, 4)
    with pytest.raises(AssertionError, match="hidden_size"):
        train(directory, "single", model=raw_config(directory)["model"] | {"hidden_size": 64})
    (directory / "corpus" / "000.txt").write_text("another text\n")
    with pytest.raises(AssertionError, match="other data"):
        train(directory, "single")


def test_a_finished_run_is_left_alone(train, unbroken):
    before = curve(unbroken("single") / "run")
    assert train(unbroken("single"), "single") == [(12, False)]
    assert curve(unbroken("single") / "run") == before


def test_an_older_checkpoint_of_the_same_run_is_refused_before_anything_changes(train, unbroken, tmp_path):
    directory = cut_after(unbroken("single"), tmp_path, 12)
    older = directory / "run" / "checkpoints" / "step-00000004"
    with pytest.raises(AssertionError, match="two histories cannot share a run directory"):
        train(directory, "single", resume=str(older), steps=16)
    assert curve(directory / "run") == curve(unbroken("single") / "run")


def test_a_mistake_that_one_stage_sees_is_told_by_all(train, unbroken, tmp_path):
    """The second stage alone lacks layers that the checkpoint has not."""
    checkpoint = list_checkpoints(unbroken("single") / "run" / "checkpoints")[-1]
    write_corpus(tmp_path / "corpus")
    model = raw_config(tmp_path)["model"] | {"num_layers": 4}
    with pytest.raises(AssertionError) as raised:
        train(tmp_path, "pipeline2", resume=str(checkpoint), model=model)
    assert str(raised.value).count("is a checkpoint from another model") >= 2


def mixture(directory, weights):
    """A data section over corpora below ``directory``, each written once."""
    sections = {}
    for name, weight in weights.items():
        corpus = directory / "corpora" / name
        if not corpus.exists():
            write_corpus(corpus, documents=40 + 10 * len(name))
        sections[name] = {"source": {"type": "text_files", "path": str(corpus)}, "weight": weight}
    return {"data": raw_config(directory)["data"] | {"source": None, "mixture": sections}}


def test_a_mixture_resumes_as_if_it_had_not_been_cut(train, tmp_path):
    both = mixture(tmp_path, {"one": 1.0, "three": 2.0})
    train(tmp_path / "whole", "single", **both)
    whole = curve(tmp_path / "whole" / "run")
    train(tmp_path / "cut", "data2_zero1", steps=4, **both)
    train(tmp_path / "cut", "single", **both)
    cut = curve(tmp_path / "cut" / "run")
    assert_same_curve(cut, whole)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert 0 < lines[0]["epochs_three"] < lines[-1]["epochs_three"]


def test_a_mixture_takes_new_weights_and_sources_but_no_other_documents(train, tmp_path):
    train(tmp_path, "single", steps=4, **mixture(tmp_path, {"one": 1.0, "three": 2.0}))
    changed = mixture(tmp_path, {"three": 1.0, "fourth": 1.0})
    train(tmp_path, "single", steps=6, **changed)
    state = CheckpointReader(list_checkpoints(tmp_path / "run" / "checkpoints")[-1]).state
    # Four steps of four samples.
    assert [phase["first"] for phase in state["mixture_phases"]] == [0, 16]
    train(tmp_path, "single", steps=8, **changed)
    state = CheckpointReader(list_checkpoints(tmp_path / "run" / "checkpoints")[-1]).state
    assert [phase["first"] for phase in state["mixture_phases"]] == [0, 16]
    (tmp_path / "corpora" / "three" / "000.txt").write_text("another text\n")
    with pytest.raises(AssertionError, match="documents of data.mixture.three differ"):
        train(tmp_path, "single", steps=10, **changed)
