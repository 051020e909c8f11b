"""``pretrain bench recall``: a small model of each configuration, trained from scratch on each recall task.

Every model is tested on sequences of the training length, of twice and of four times that length, none of which has a
content that was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pretrain.config import Config, load_config
from pretrain.errors import InputError
from pretrain.evaluate.recall import tasks_by_name
from pretrain.evaluate.recall.base import RecallTask
from pretrain.evaluate.recall.training import Accuracy, accuracy_of, config_for, train_on
from pretrain.observe.metrics import replace_file
from pretrain.observe.picture import COLOURS, save, style

# Lengths of the tests over that of the training.
MULTIPLES = (1, 2, 4)


@dataclass(frozen=True)
class RecallOutcome:
    """One model on one task.

    Attributes:
        mixers: of its layers, each once.
        parameters: of the whole model.
        training_length: tokens of a sequence in training.
        accuracy: by length of the test sequences.
        chance: of a guess, by length.
    """

    model: str
    task: str
    mixers: list[str]
    parameters: int
    steps: int
    training_length: int
    accuracy: dict[int, Accuracy]
    chance: dict[int, float]


def bench_recall(
    configs: Sequence[Path],
    overrides: Sequence[str],
    tasks: Sequence[str],
    steps: int,
    length: int | None,
    samples: int,
    say: Callable[[str], object],
) -> list[RecallOutcome]:
    """Trains and tests each configuration on each task.

    Of a configuration the model, optimizer, schedule, batch size and seed count; its data and layout do not.

    Args:
        tasks: their names; none means all.
        steps: of each training.
        length: tokens of a sequence in training; None: each task's own.
        samples: test sequences of each length.

    Raises:
        InputError: a configuration or task is wrong, or two configurations have one name.
    """
    names = [path.stem for path in configs]
    if len(set(names)) < len(names):
        raise InputError(f"two configurations have the same file name among {', '.join(map(str, configs))}")
    chosen = tasks_by_name(tasks)
    prepared: list[tuple[str, RecallTask, Config, int]] = []
    for name, path in zip(names, configs, strict=True):
        config = load_config(path, overrides)
        for task in chosen:
            trained = task.training_length if length is None else length
            task.example("train", trained, 0)  # Refuses a length that is too short before anything is trained.
            prepared.append((name, task, config_for(task, config, steps, str(path)), trained))
    return [_outcome(name, task, config, trained, samples, say) for name, task, config, trained in prepared]


def _outcome(
    name: str, task: RecallTask, config: Config, trained: int, samples: int, say: Callable[[str], object]
) -> RecallOutcome:
    say(f"{name}: {task.name}")
    model = train_on(task, config, trained, lambda text: say(f"  {text}"))
    accuracy, rows = {}, config.train.micro_batch_size
    for length in [trained * multiple for multiple in MULTIPLES]:
        accuracy[length] = accuracy_of(model, task, length, samples, rows, config.train.seed)
    mixers = [block.mixer.type for block in config.model.blocks_in_use() if block.mixer is not None]
    return RecallOutcome(
        name,
        task.name,
        list(dict.fromkeys(mixers)),
        sum(parameter.numel() for parameter in model.parameters()),
        config.train.steps,
        trained,
        accuracy,
        {length: task.chance(length) for length in accuracy},
    )


def table(outcomes: Sequence[RecallOutcome]) -> Table:
    """A row for each task and length, a column for each model."""
    models = list(dict.fromkeys(outcome.model for outcome in outcomes))
    drawn = Table(title="Share of right answers, trained on the first length of each task")
    drawn.add_column("task")
    for title in ("length", "chance", *models):
        drawn.add_column(title, justify="right")
    found = {(outcome.task, outcome.model): outcome for outcome in outcomes}
    for task in dict.fromkeys(outcome.task for outcome in outcomes):
        own = [found[task, model] for model in models]
        for length, chance in own[0].chance.items():
            shares = [f"{outcome.accuracy[length].share:.3f}" for outcome in own]
            drawn.add_row(task, f"{length:,}", f"{chance:.3f}", *shares)
    return drawn


def draw(outcomes: Sequence[RecallOutcome], output: Path) -> Path:
    """A panel for each task: accuracy over the length of the test, a line for each model.

    Raises:
        InputError: for a suffix that is not known, or a picture that cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(outcome.model for outcome in outcomes))
    tasks = list(dict.fromkeys(outcome.task for outcome in outcomes))
    columns = min(4, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(3.6 * columns + 1, 3.2 * rows + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels[len(tasks) :]:
        panel.set_visible(False)
    for panel, task in zip(panels, tasks, strict=False):
        own = [outcome for outcome in outcomes if outcome.task == task]
        style(panel, task, "right answers")
        for outcome in own:
            index = models.index(outcome.model)
            lengths, shares = zip(*((n, of.share) for n, of in outcome.accuracy.items()), strict=True)
            panel.plot(lengths, shares, color=COLOURS[index % len(COLOURS)], marker="o", label=outcome.model)
        chance = own[0].chance
        panel.plot(list(chance), list(chance.values()), color="#777777", linestyle="--", linewidth=1, label="chance")
        panel.set_ylim(-0.03, 1.05)
        panel.set_xscale("log", base=2)
        panel.set_xticks(list(chance), [f"{length:,}" for length in chance])
        panel.minorticks_off()
        panel.set_xlabel("length of the test (trained on the first)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), frameon=False)
    return save(figure, output)


def to_json(outcomes: Sequence[RecallOutcome]) -> str:
    """All figures."""
    return json.dumps([asdict(outcome) for outcome in outcomes], indent=2)


def print_bench_recall(
    configs: Sequence[Path],
    overrides: Sequence[str],
    tasks: Sequence[str],
    steps: int,
    length: int | None,
    samples: int,
    directory: Path | None,
    as_json: bool,
) -> None:
    """The comparison as a table or as JSON, and all that :func:`write` writes where a directory is given."""
    notes = Console(stderr=True)
    outcomes = bench_recall(configs, overrides, tasks, steps, length, samples, notes.print)
    if directory is not None:
        write(outcomes, directory)
    if as_json:
        print(to_json(outcomes))
    else:
        Console().print(table(outcomes))


def write(outcomes: Sequence[RecallOutcome], directory: Path) -> None:
    """Writes ``recall.json``, ``recall.txt`` and ``recall.png`` into a directory, which is made where it is missing.

    Raises:
        InputError: they cannot be written.
    """
    import io

    text = io.StringIO()
    Console(file=text, width=200).print(table(outcomes))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        replace_file(directory / "recall.json", to_json(outcomes).encode() + b"\n")
        replace_file(directory / "recall.txt", text.getvalue().encode())
    except OSError as error:
        raise InputError(f"{directory} cannot be written: {error.strerror or error}; give another --out") from None
    draw(outcomes, directory / "recall.png")
