"""Recall tasks: the same by index, disjoint splits, labels exactly where the tokens before decide, chance as stated."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from data.batch import IGNORED_LABEL
from pretrain.errors import InputError
from pretrain.evaluate.recall import recall_tasks, tasks_by_name
from pretrain.evaluate.recall.base import RecallTask, as_batch, split_of
from pretrain.evaluate.recall.training import right_answers
from tests.evaluate.recall_oracles import ORACLES

TASKS = recall_tasks()
LENGTHS = (64, 96)


@pytest.fixture(params=list(TASKS))
def task(request: pytest.FixtureRequest) -> RecallTask:
    return TASKS[request.param]


def test_every_task_has_an_oracle() -> None:
    assert set(TASKS) == set(ORACLES)


def test_an_example_is_a_function_of_its_index(task: RecallTask) -> None:
    examples = task.examples("test", 64, range(20))
    again = [task.example("test", 64, index) for index in reversed(range(20))][::-1]
    for one, two in zip(examples, again, strict=True):
        np.testing.assert_array_equal(one.tokens, two.tokens)
        np.testing.assert_array_equal(one.labels, two.labels)
        assert (one.content, one.case) == (two.content, two.case)
    contents = {example.content for example in examples}
    assert len(contents) > 10
    assert {example.content for example in task.examples("test", 64, range(20), seed=1)} != contents


def test_no_content_is_in_both_splits(task: RecallTask) -> None:
    seen = {
        split: {e.content for n in LENGTHS for seed in (0, 1) for e in task.examples(split, n, range(60), seed)}
        for split in ("train", "test")
    }
    assert len(seen["train"]) > 40 and len(seen["test"]) > 20
    assert not seen["train"] & seen["test"]
    assert all(split_of(content) == split for split, contents in seen.items() for content in contents)


@pytest.mark.parametrize("length", [63, *LENGTHS])
def test_labels_are_what_the_tokens_before_decide(task: RecallTask, length: int) -> None:
    for example in task.examples("train", length, range(40)):
        tokens, labels = example.tokens.tolist(), example.labels
        assert len(tokens) == len(labels) == length
        assert min(tokens) >= 0 and max(tokens) < task.vocabulary_size
        asked = {place: int(labels[place]) for place in np.flatnonzero(labels != IGNORED_LABEL).tolist()}
        assert asked and asked == ORACLES[task.name](tokens)
        # An answer needs nothing that comes later; these oracles need not be told where the sequence ends.
        if not task.whole_answers and task.name != "copying":
            for place in random.Random(0).sample(sorted(asked), min(3, len(asked))):
                assert ORACLES[task.name](tokens[: place + 1])[place] == asked[place]


def test_the_oracle_is_always_right_and_a_wrong_label_spoils_its_answer(task: RecallTask) -> None:
    (example,) = task.examples("test", 64, [3])
    predicted = np.zeros(64, dtype=np.int64)
    for place, answer in ORACLES[task.name](example.tokens.tolist()).items():
        predicted[place] = answer
    right = right_answers(task, example, predicted)
    assert right.all()
    last = np.flatnonzero(example.labels != IGNORED_LABEL)[-1]
    predicted[last] += 1
    assert right_answers(task, example, predicted).tolist() == [*right[:-1].tolist(), False]
    groups = {"passkey": 1, "anbncn": 2}
    assert len(right) == groups.get(task.name, int((example.labels != IGNORED_LABEL).sum()))


def _guesses(task: RecallTask, tokens: np.ndarray, labels: np.ndarray, draw: random.Random) -> np.ndarray:
    """Answers at random by someone who has not remembered where anything was."""
    tokens, count = tokens.tolist(), len(tokens)
    choices = {
        "mqar": [token for token in tokens if token > 32],
        "passkey": list(range(10)),
        "automaton": sorted({token for token in tokens if token > 1}),
        "dyck": list(range(4, 8)),
        "copying": [token for token in tokens if token > 1],
    }[task.name]
    return np.array(draw.choices(choices, k=count))


@pytest.mark.parametrize("name", ["mqar", "automaton", "dyck", "copying"])
def test_chance_is_what_guessing_gives(name: str) -> None:
    task, draw, right = TASKS[name], random.Random(0), []
    for example in task.examples("test", 64, range(200)):
        right += right_answers(task, example, _guesses(task, example.tokens, example.labels, draw)).tolist()
    # Four standard errors.
    assert np.mean(right) == pytest.approx(task.chance(64), abs=4 * (0.25 / len(right)) ** 0.5)


def test_chance_of_counts_and_numbers() -> None:
    assert TASKS["passkey"].chance(64) == 1e-3
    for name in ("parity", "mod3", "mod5"):
        labels = np.stack([example.labels for example in TASKS[name].examples("test", 64, range(250))])
        # The best answer at each place, chosen on the same examples: a little above what can be known.
        best = np.mean([Counter(column.tolist()).most_common(1)[0][1] / 250 for column in labels.T])
        assert best == pytest.approx(TASKS[name].chance(64), abs=0.05) and best > TASKS[name].chance(64) - 0.01
    counts = Counter(
        count
        for example in TASKS["anbncn"].examples("train", 64, range(300))
        for count in [int(part) for part in example.content.decode().split(",")]
    )
    assert set(counts) == set(range(1, 11)) and TASKS["anbncn"].chance(64) == 1 / 10


def test_cases_and_longer_sequences() -> None:
    examples = TASKS["passkey"].examples("test", 128, range(10))
    assert [example.case for example in examples[:5]] == [f"depth {d}" for d in ("0", "0.25", "0.5", "0.75", "1")]
    assert examples[0].tokens[0] == 10 and examples[4].tokens[128 - 3 - 4] == 10
    # As many pairs and symbols as in short ones, further apart.
    for name, asked in (("mqar", 8), ("copying", 6)):
        assert as_batch(TASKS[name].examples("test", 256, range(4))).label_count == 4 * asked
    depths = [
        max(np.cumsum(np.where(example.tokens < 4, 1, -1)))
        for example in TASKS["dyck"].examples("test", 256, range(10))
    ]
    assert max(depths) == 4


def test_what_is_refused() -> None:
    with pytest.raises(InputError, match="no recall task 'parties'.*did you mean 'parity'"):
        tasks_by_name(["mqar", "parties"])
    assert [task.name for task in tasks_by_name(["dyck", "mqar", "dyck"])] == ["dyck", "mqar"]
    assert len(tasks_by_name([])) == len(TASKS)
    for task in TASKS.values():
        task.example("train", task.shortest, 0)
        with pytest.raises(InputError, match=f"{task.name}: sequences of {task.shortest - 1} tokens are too short"):
            task.example("train", task.shortest - 1, 0)
