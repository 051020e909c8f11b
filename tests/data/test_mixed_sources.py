"""A run's data from several sources: configuration, samples, held-out samples, fingerprints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pydantic
import pytest
import torch

from data.baseline import bigram_bits_per_byte
from data.batch import IGNORED_LABEL
from data.config import DataConfig
from data.dataset import Data, open_data
from data.errors import DataError
from data.mixture import Phase

LENGTH = 16


@pytest.fixture
def corpora(tmp_path: Path) -> dict[str, Path]:
    """Three directories whose texts are made of one letter each."""
    directories = {}
    for letter, files in (("a", 40), ("b", 60), ("c", 50)):
        directories[letter] = tmp_path / letter
        directories[letter].mkdir()
        for number in range(files):
            (directories[letter] / f"{number}.txt").write_text(letter * (10 + number))
    return directories


def mixture_config(corpora: dict[str, Path], weights: dict[str, float], **settings: Any) -> DataConfig:
    mixture = {
        name: {"source": {"type": "text_files", "path": str(corpora[name])}, "weight": weight}
        for name, weight in weights.items()
    }
    raw = {"mixture": mixture, "tokenizer": {"type": "bytes"}, "sequence_length": LENGTH, "held_out_fraction": 0.2}
    return DataConfig.model_validate(raw | settings)


def letters(data: Data, indices: range) -> list[str]:
    """The letter of each sample, which comes from one source."""
    found = []
    for row in data.train.batch(indices).tokens:
        (letter,) = set(row.tolist()) - {256}
        found.append(chr(letter))
    return found


def test_samples_come_from_the_sources_by_weight(corpora) -> None:
    data = open_data(mixture_config(corpora, {"a": 1, "b": 3}), seed=0)
    found = letters(data, range(400))
    assert abs(found.count("a") - 100) <= 2 and found.count("b") == 400 - found.count("a")
    assert data.train.epochs(400) == {
        name: found.count(name) / data.summaries[name].train.samples_per_epoch for name in ("a", "b")
    }


def test_a_batch_is_its_samples(corpora) -> None:
    data = open_data(mixture_config(corpora, {"a": 1, "b": 3, "c": 2}), seed=0)
    together = data.train.batch(range(37, 61))
    alone = [data.train.batch([index]) for index in range(37, 61)]
    assert torch.equal(together.tokens, torch.cat([batch.tokens for batch in alone]))
    assert torch.equal(together.labels, torch.cat([batch.labels for batch in alone]))
    assert torch.equal(together.document_starts, torch.cat([batch.document_starts for batch in alone]))
    assert together.label_bytes == sum(batch.label_bytes for batch in alone)


def test_each_source_reads_its_own_epochs(corpora) -> None:
    data = open_data(mixture_config(corpora, {"a": 1, "b": 1}), seed=0)
    count = 3 * data.train.sources["a"].samples_per_epoch
    rows = [tuple(row.tolist()) for row in data.train.batch(range(count)).tokens]
    for name, samples in data.train.sources.items():
        own = [row for row in rows if ord(name) in row]
        assert own == [tuple(row.tolist()) for row in samples.batch(range(len(own))).tokens]


def test_a_curriculum_changes_weights_at_its_tokens(corpora) -> None:
    curriculum = [
        {"from_tokens": 100 * LENGTH, "weights": {"c": 1}},
        {"from_tokens": 151 * LENGTH - 5, "weights": {"a": 1}},
    ]
    data = open_data(mixture_config(corpora, {"a": 1, "b": 1, "c": 1e-6}, curriculum=curriculum), seed=0)
    found = letters(data, range(200))
    assert set(found[:100]) == {"a", "b"}
    assert set(found[100:151]) == {"c"}
    assert set(found[151:]) == {"a"}


def test_new_weights_and_sources_repeat_nothing(corpora) -> None:
    before = open_data(mixture_config(corpora, {"a": 1, "b": 1}), seed=0)
    after = open_data(mixture_config(corpora, {"b": 1, "c": 2}), seed=0)
    after.train.go_on([Phase(0, {"a": 1.0, "b": 1.0})], 101)
    assert after.train.order.phases[-1] == Phase(101, {"b": 1.0, "c": 2.0})
    read = before.train.order.consumed(101)
    rows = after.train.batch(range(101, 161)).tokens
    ours = [row.tolist() for row in rows if ord("b") in row]
    expected = before.train.sources["b"].batch(range(read["b"], read["b"] + len(ours))).tokens
    assert ours == expected.tolist() and len(ours) == 20


def test_held_out_samples_are_those_of_every_source(corpora) -> None:
    data = open_data(mixture_config(corpora, {"a": 1, "b": 5}), seed=0)
    held_out = data.held_out
    batch = held_out.batch(range(held_out.samples_per_epoch + 2))
    assert (batch.labels[-2:] == IGNORED_LABEL).all()
    expected = [samples.batch(range(samples.samples_per_epoch)) for samples in held_out.sources.values()]
    assert torch.equal(batch.labels[:-2], torch.cat([part.labels for part in expected]))
    assert batch.label_bytes == sum(part.label_bytes for part in expected)
    # One letter follows another almost surely.
    assert bigram_bits_per_byte(data.train, held_out) < 1


def test_fingerprints(corpora) -> None:
    first = open_data(mixture_config(corpora, {"a": 1, "b": 1}), seed=0)
    other_weights = open_data(mixture_config(corpora, {"b": 3, "a": 1, "c": 1}), seed=0)
    assert other_weights.fingerprint == first.fingerprint
    assert first.source_fingerprints.items() < other_weights.source_fingerprints.items()
    assert open_data(mixture_config(corpora, {"a": 1, "b": 1}), seed=1).fingerprint != first.fingerprint
    (corpora["b"] / "0.txt").write_text("other")
    changed = open_data(mixture_config(corpora, {"a": 1, "b": 1}), seed=0).source_fingerprints
    assert changed["a"] == first.source_fingerprints["a"] and changed["b"] != first.source_fingerprints["b"]


def test_the_summary_adds_the_sources_up(corpora) -> None:
    data = open_data(mixture_config(corpora, {"a": 1, "b": 1}), seed=0)
    for split in ("train", "held_out"):
        parts = [getattr(summary, split) for summary in data.summaries.values()]
        whole = getattr(data.summary, split)
        assert whole.counts.tokens == sum(part.counts.tokens for part in parts)
        assert whole.counts.bytes == sum(part.counts.bytes for part in parts)
        assert whole.samples_per_epoch == sum(part.samples_per_epoch for part in parts)


def test_a_source_that_cannot_be_read_is_named(corpora) -> None:
    config = mixture_config(corpora, {"a": 1, "b": 1})
    for path in corpora["b"].iterdir():
        path.unlink()
    with pytest.raises(DataError, match="data.mixture.b: no file below"):
        open_data(config, seed=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": {"type": "standard_library"}}, "either source or mixture, not both"),
        ({"mixture": None}, "either source or mixture"),
        ({"mixture": {}}, "at least 1 item"),
        ({"curriculum": [{"from_tokens": 9, "weights": {"z": 1}}]}, "names the source 'z', but mixture has"),
        (
            {"curriculum": [{"from_tokens": 9, "weights": {"a": 1}}, {"from_tokens": 9, "weights": {"b": 1}}]},
            "from_tokens must rise, but 9 follows 9",
        ),
        ({"curriculum": [{"from_tokens": 9, "weights": {"a": 0}}]}, "greater than 0"),
        ({"curriculum": [{"from_tokens": 9, "weights": {}}]}, "at least 1 item"),
        (
            {
                "mixture": None,
                "source": {"type": "standard_library"},
                "curriculum": [{"from_tokens": 9, "weights": {"a": 1}}],
            },
            "changes the weights of a mixture, but there is none",
        ),
    ],
)
def test_configurations_that_say_nothing_sensible(corpora, settings, message) -> None:
    with pytest.raises(pydantic.ValidationError, match=message):
        mixture_config(corpora, {"a": 1, "b": 1}, **settings)


def test_a_name_that_would_not_do_as_a_key(corpora) -> None:
    corpora["b/c"] = corpora["b"]
    with pytest.raises(pydantic.ValidationError, match="take letters, digits"):
        mixture_config(corpora, {"b/c": 1})


def test_two_changes_within_one_sample(corpora) -> None:
    curriculum = [{"from_tokens": 17, "weights": {"a": 1}}, {"from_tokens": 20, "weights": {"b": 1}}]
    with pytest.raises(DataError, match="changes the weights twice within one sample of 16 tokens"):
        open_data(mixture_config(corpora, {"a": 1, "b": 1}, curriculum=curriculum), seed=0)
