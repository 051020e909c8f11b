"""``pretrain evaluate RUN --suite recall``: what a trained model recalls of texts, by task, length and depth."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.tokenizers import open_tokenizer
from pretrain.errors import InputError
from pretrain.evaluate.by_position import check_lengths
from pretrain.evaluate.recall.passkey import DEPTHS
from pretrain.evaluate.recall.text import TEXT_TASKS, TextRecall, recall_of_text
from pretrain.models.loading import load_decoder
from pretrain.observe.metrics import replace_file
from pretrain.observe.page_recall import RECALL_FILE
from pretrain.observe.picture import check_suffix, save

# Below this many bytes nothing lies between what is hidden and the question.
_SHORTEST = 256


@dataclass(frozen=True)
class RecallSuite:
    """What one checkpoint recalls.

    Attributes:
        lengths: bytes of the prompts.
        notes: what a reader of the figures should know, a sentence each.
    """

    checkpoint: str
    step: int
    training_length: int
    lengths: list[int]
    results: list[TextRecall]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_text(self) -> str:
        """A table for each task: a row for each depth, a column for each length."""
        lines = [f"{self.checkpoint} (step {self.step}), trained on rows of {self.training_length:,} tokens"]
        for task in dict.fromkeys(result.task for result in self.results):
            lines.append(f"{task}: share of answers that are right as a whole, and of their tokens")
            lines.append(f"  {'depth':>6}" + "".join(f"{f'{length:,} bytes':>16}" for length in self.lengths))
            for depth in DEPTHS:
                own = [result for result in self.results if (result.task, result.depth) == (task, depth)]
                cells = [f"{f'{result.exact:.2f}  {result.tokens:.2f}':>16}" for result in own]
                lines.append(f"  {depth:>6g}" + "".join(cells))
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def evaluate_recall(
    source: Path, examples: int, lengths: Sequence[int] | None = None, picture: Path | None = None
) -> RecallSuite:
    """Tests a run or checkpoint, in one process; of a run the outcome is kept in it, in ``recall.json``.

    Args:
        examples: texts of each task, length and depth.
        lengths: bytes of the prompts; None: the training length and four times it, or 256 bytes and more.
        picture: where the shares of right answers are drawn.

    Raises:
        InputError: there is no such checkpoint, its tokenizer cannot be opened or does not suit, it reads words, or a
            length is too short for what is asked, or too long for a state that grows.
    """
    if picture is not None:
        check_suffix(picture)
    loaded = load_decoder(source, "auto")
    if loaded.config.model.reads_word_starts:
        raise InputError(
            f"{loaded.checkpoint}: model.hierarchy.type={loaded.config.model.hierarchy.type} reads words, of which "
            f"the last is known only once it has ended, so answers have no tokens of their own; take a model over bytes"
        )
    trained = loaded.config.data.sequence_length
    shortest = max(trained, _SHORTEST)
    wanted = list(lengths) if lengths is not None else [shortest, 4 * shortest]
    # A token is a byte or more.
    notes = check_lengths(loaded.config, wanted)
    try:
        tokenizer = open_tokenizer(loaded.config.data.tokenizer)
    except DataError as error:
        raise InputError(f"the tokenizer of {loaded.checkpoint} cannot be opened: {error}") from error
    results = recall_of_text(loaded.decoder, tokenizer, wanted, examples, loaded.config.train.seed)
    suite = RecallSuite(str(loaded.checkpoint), loaded.step, trained, wanted, results, notes)
    if loaded.checkpoint.resolve().parents[1] == Path(source).resolve():
        suite = _keep(suite, Path(source) / RECALL_FILE)
    if picture is not None:
        _draw(suite, picture)
    return suite


def _keep(suite: RecallSuite, file: Path) -> RecallSuite:
    """Writes the outcome, so that ``pretrain report`` finds it; where that fails the suite says so in a note."""
    try:
        replace_file(file, (json.dumps(suite.to_dict(), indent=2) + "\n").encode())
    except OSError as error:
        return replace(suite, notes=[*suite.notes, f"{file} cannot be written: {error.strerror or error}"])
    return suite


def _draw(suite: RecallSuite, output: Path) -> Path:
    """A map for each task: depth down, length across, the share of right tokens as colour and number."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.5 + 1.6 * len(suite.lengths) * len(TEXT_TASKS), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(TEXT_TASKS), squeeze=False)[0]
    for panel, task in zip(panels, TEXT_TASKS, strict=True):
        own = {(result.depth, place): result for place, result in _placed(suite, task.name)}
        shares = [[own[depth, place].tokens for place in range(len(suite.lengths))] for depth in DEPTHS]
        panel.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for (depth, place), result in own.items():
            row, colour = DEPTHS.index(depth), "black" if result.tokens > 0.6 else "white"
            panel.text(place, row, f"{result.tokens:.2f}", ha="center", va="center", color=colour)
        panel.set_title(f"{task.name}: tokens of the answer that are right", loc="left", fontsize=10)
        panel.set_xticks(range(len(suite.lengths)), [f"{length:,}" for length in suite.lengths])
        panel.set_yticks(range(len(DEPTHS)), [f"{depth:g}" for depth in DEPTHS])
        panel.set_xlabel("bytes of the prompt")
        panel.set_ylabel("depth: 0 front, 1 end")
    return save(figure, output)


def _placed(suite: RecallSuite, task: str) -> list[tuple[int, TextRecall]]:
    """A task's results, each with the place of its length."""
    results = [result for result in suite.results if result.task == task]
    return [(number // len(DEPTHS), result) for number, result in enumerate(results)]
