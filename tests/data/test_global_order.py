"""The whole pipeline's promise: random sources, weights, packings, stops and numbers of ranks, one global order."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batch import SampleFormat
from data.best_fit import BestFitSamples
from data.blocks import BlockReader
from data.encoding import Encoder
from data.mixture import Phase
from data.order import rank_share
from data.packing import PackedSamples, SourceSamples
from data.samples import MixtureSamples
from data.source import Cursor, Document, DocumentReader
from data.stream import StreamedSamples
from data.tokenizers.byte_level import ByteTokenizer

LENGTH = 6
WORLDS = (1, 2, 3, 4, 8)
# Divides over every number of ranks.
BATCH = 48
TOKENIZER = ByteTokenizer()
FORMAT = SampleFormat.of(TOKENIZER, LENGTH)


class Listed:
    """Documents from a list, as a source."""

    def __init__(self, contents: list[bytes]) -> None:
        self.contents = contents

    def read(self, cursor: Cursor | None = None) -> DocumentReader:
        place = dict(cursor or {"next": 0})

        def documents():
            for number in range(place["next"], len(self.contents)):
                place["next"] = number + 1
                yield Document(str(number), f"document {number}", self.contents[number])

        return DocumentReader(documents(), lambda: dict(place))


def open_samples(kind: str, contents: list[bytes], make_byte_samples: Any) -> SourceSamples:
    documents = make_byte_samples(contents, 2).documents
    if kind == "concatenated":
        return PackedSamples(documents, FORMAT, seed=5, shuffled=True)
    if kind == "whole documents":
        return BestFitSamples(documents, FORMAT, seed=5)
    packing = "best_fit" if kind == "stream of whole documents" else "concatenate"
    reader = BlockReader(
        source=Listed(contents),
        is_held_out=lambda identity: False,
        encoder=Encoder(TOKENIZER, None, 0),
        boundary_id=TOKENIZER.boundary_id,
        seed=5,
        shuffle_documents=3,
    )
    return StreamedSamples(reader, FORMAT, packing, background=False)


KINDS = ("concatenated", "whole documents", "stream", "stream of whole documents")


@st.composite
def runs(draw: st.DrawFn) -> dict[str, Any]:
    """Sources of every kind, their weights, and starts of a run: from which step on how many ranks."""
    contents = st.lists(st.binary(min_size=4, max_size=20), min_size=2, max_size=8)
    sources = draw(st.dictionaries(st.sampled_from("abc"), st.tuples(st.sampled_from(KINDS), contents), min_size=1))
    weights = {name: draw(st.floats(0.1, 10)) for name in sources}
    phases = [Phase(0, weights)]
    if draw(st.booleans()):
        chosen = draw(st.lists(st.sampled_from(sorted(sources)), min_size=1, unique=True))
        phases.append(Phase(draw(st.integers(1, 3 * BATCH)), {name: draw(st.floats(0.1, 10)) for name in chosen}))
    steps = draw(st.integers(1, 4))
    stops = sorted(draw(st.sets(st.integers(1, steps), max_size=2)) - {steps})
    starts = [(step, draw(st.sampled_from(WORLDS)), draw(st.sampled_from([1, 2]))) for step in (0, *stops)]
    return {"sources": sources, "phases": phases, "steps": steps, "starts": starts}


@settings(max_examples=60, deadline=None)
@given(runs())
def test_any_run_reads_the_samples_of_one_process(make_byte_samples, run: dict[str, Any]) -> None:
    def opened() -> MixtureSamples:
        samples = {name: open_samples(*source, make_byte_samples) for name, source in run["sources"].items()}
        return MixtureSamples(samples, run["phases"], seed=9)

    unbroken = opened()
    expected = [row for i in range(run["steps"] * BATCH) for row in unbroken.batch([i]).labels.tolist()]
    # Nothing is left out or repeated: each source gives its samples 0, 1, 2, ... and the order says where.
    for name in run["sources"]:
        located = [unbroken.order.locate(index) for index in range(run["steps"] * BATCH)]
        own = [within for source, within in located if source == name]
        assert own == list(range(len(own)))

    read: list[list[int]] = []
    saved: dict[str, Any] | None = None
    for (first, ranks, micro_batch_size), last in zip(
        run["starts"], [start for start, _, _ in run["starts"][1:]] + [run["steps"]], strict=True
    ):
        processes = [opened() for _ in range(ranks)]
        for samples in processes if saved else ():
            samples.go_on([Phase(**phase) for phase in saved["phases"]], saved["position"])
            for name, bookmark in saved["bookmarks"].items():
                samples.sources[name].go_on(bookmark)
        for step in range(first, last):
            indices = range(step * BATCH, (step + 1) * BATCH)
            for rank, samples in enumerate(processes):
                for share in rank_share(indices, micro_batch_size, rank, ranks):
                    read += samples.batch(share).labels.tolist()
        # What the main rank writes into a checkpoint.
        state = {
            "position": last * BATCH,
            "bookmarks": processes[0].bookmarks(last * BATCH),
            "phases": [vars(phase) for phase in processes[0].order.phases],
        }
        saved = json.loads(json.dumps(state))
    assert read == expected


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(KINDS), st.integers(0, 2**32))
def test_an_epoch_of_any_kind_holds_every_document(make_byte_samples, kind: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    # Each document is made of one letter of its own, so that what is read can be counted.
    contents = [bytes([letter]) * int(random.integers(1, 12)) for letter in range(12)]
    samples = open_samples(kind, contents, make_byte_samples)
    counts = np.zeros(257, dtype=int)
    index = 0
    while counts[:256].sum() < sum(map(len, contents)) - LENGTH:
        labels = samples.batch([index]).labels.numpy()
        counts += np.bincount(labels[labels >= 0], minlength=257)
        index += 1
    missing = [len(content) - counts[letter] for letter, content in enumerate(contents)]
    assert sum(abs(number) for number in missing) <= 2 * LENGTH, "more than what one sample cuts off"
