"""The model card of an exported model: ``README.md``, from what the run left behind, and nothing that it did not."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import ModelCardData

from data.config import DataConfig
from pretrain.checkpoint import CheckpointReader
from pretrain.checkpoint.directory import CHECKPOINTS_DIRECTORY
from pretrain.config.model import ModelConfig
from pretrain.config.schema import Config
from pretrain.config.sections import OptimizerConfig
from pretrain.convert.custom import CustomForm
from pretrain.convert.native import NativeForm, parts_of
from pretrain.models.registry import family_of
from pretrain.observe.metrics import read_metrics
from pretrain.observe.run_directory import RunDirectory
from pretrain.plan import plan

CARD_FILE = "README.md"

# Behind the front matter's fields, where whoever publishes the model sees what is missing.
_TO_FILL_IN = """\
# To be filled in by whoever publishes this model; the hub shows no licence until it is named:
# license: apache-2.0
# language: [en]
"""
_MISSING = """\
## Not said here

The licence, the languages, intended uses and known limits are for whoever publishes this model to add: what is written
above comes from the run's own files alone.
"""


@dataclass(frozen=True)
class Training:
    """What is known of how a checkpoint came to be.

    Attributes:
        step: optimizer steps.
        tokens: that those steps read; None where nothing says so.
        last: the run's figures of the last step that has any, see :mod:`pretrain.observe.metrics`; None without them.
        evaluated: those of the last step that was evaluated.
        imported_from: the class that the weights were imported from, where they were not trained since.
    """

    step: int
    tokens: int | None = None
    last: Mapping[str, Any] | None = None
    evaluated: Mapping[str, Any] | None = None
    imported_from: str | None = None


def read_training(reader: CheckpointReader) -> Training:
    """What the checkpoint, and the figures of the run directory that it lies in, say.

    Raises:
        InputError: the figures are damaged.
    """
    origin, position = reader.state.get("imported_from"), reader.state.get("position")
    if isinstance(origin, dict):
        return Training(reader.step, imported_from=str(origin.get("architecture")))
    tokens = position.get("tokens") if isinstance(position, dict) else None
    checkpoint = reader.path.resolve()
    figures: list[dict[str, Any]] = []
    if checkpoint.parent.name == CHECKPOINTS_DIRECTORY:
        file = RunDirectory(checkpoint.parent.parent).metrics_file
        figures = [line for line in read_metrics(file) if line["step"] <= reader.step] if file.exists() else []
    evaluated = [line for line in figures if line.get("held_out_loss") is not None]
    return Training(
        reader.step,
        tokens,
        figures[-1] if figures else None,
        evaluated[-1] if evaluated else None,
    )


def write_model_card(
    directory: Path,
    name: str,
    form: NativeForm | CustomForm,
    config: Config,
    dtype: str,
    shapes: Mapping[str, tuple[int, ...]],
    training: Training,
) -> None:
    """Writes ``README.md``.

    Args:
        name: of the model.
        form: that it is exported in.
        config: of its run.
        dtype: of its weights.
        shapes: of its parameters.
        training: how it came to be.
    """
    parts = [
        _front_matter(form, config.model),
        f"# {name}\n",
        _model(form, config, dtype, sum(map(math.prod, shapes.values())), training),
        _use(name, form, dtype),
    ]
    if training.imported_from is None:
        parts += [_training(config, training), _results(training)]
    (directory / CARD_FILE).write_text("\n".join(part for part in [*parts, _MISSING] if part), encoding="utf-8")


def _front_matter(form: NativeForm | CustomForm, model: ModelConfig) -> str:
    mixers = {family_of(config).name for block in model.blocks.values() for _, config in parts_of(block)}
    tags = [*sorted(mixers), *(["custom_code"] if form.needs_code else [])]
    if model.hierarchy is not None:
        tags.append(model.hierarchy.type)
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=tags)
    return f"---\n{data.to_yaml()}\n{_TO_FILL_IN}---\n"


def _table(rows: Mapping[str, Any]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value is not None]
    return "\n".join(["| | |", "|---|---|", *lines]) + "\n"


def _model(form: NativeForm | CustomForm, config: Config, dtype: str, parameters: int, training: Training) -> str:
    # Of the model alone: a teacher that is gone or damaged does not matter here.
    alone = config.model_copy(update={"distillation": None})
    model, active = config.model, plan(alone).active_parameters
    layers = Counter(_block_text(model, layer) for layer in range(model.num_layers))
    lengths = sorted({length for _, length in config.sequence_lengths()})
    loaded = form.loaded_dtype(dtype)
    kept = dtype != "float32" and (form.needs_code or loaded == "float32")
    rounded = ", norms and gates float32" if kept else ""
    rows = {
        "class": f"`{form.architecture}`" + (", with code of its own" if form.needs_code else ""),
        "parameters": f"{parameters:,}",
        "parameters that one token uses": f"{active:,}" if active != parameters else None,
        "weights": f"{dtype}{rounded}" + ("" if loaded == dtype else f", loaded as {loaded}"),
        "layers": "; ".join(f"{count} of {text}" for text, count in layers.items()),
        "hidden size": model.hidden_size,
        "stages round the layers": None if model.hierarchy is None else model.hierarchy.type,
        "vocabulary": f"{model.vocab_size:,}" + (", embeddings tied" if model.tie_embeddings else ""),
        "norm": model.norm,
        # A configuration that was imported with the weights says nothing of how they were trained.
        "context length in training": f"{', '.join(map(str, lengths))} tokens"
        if training.imported_from is None
        else None,
        "weights imported from": f"`{training.imported_from}`, not trained since" if training.imported_from else None,
    }
    return f"## Model\n\n{_table(rows)}"


def _block_text(model: ModelConfig, layer: int) -> str:
    return " and ".join(family_of(config).name for _, config in parts_of(model.block(layer)))


def _use(name: str, form: NativeForm | CustomForm, dtype: str) -> str:
    trust = ", trust_remote_code=True" if form.needs_code else ""
    loading = f"""\
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}"{trust}, dtype="{form.loaded_dtype(dtype)}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
inputs = tokenizer(tokenizer.bos_token + "The state", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

In training every document stood behind the mark `tokenizer.bos_token`, which is also `tokenizer.eos_token`.
"""
    lines = [loading]
    if form.needs_code:
        lines.append("The model's code lies beside its weights, hence `trust_remote_code=True`: read it first.\n")
    if form.needs_code and form.model.reads_word_starts:
        lines.append("It finds words with the package `hat-splitter`, which must be installed.\n")
    if not form.cached_generation:
        lines.append("`generate` reads the whole text for each token: no cache holds this model's state.\n")
    lines.append(_batches(form))
    return "\n".join(lines)


def _batches(form: NativeForm | CustomForm) -> str:
    """What the class does with padding and packed documents."""
    if form.masks_padding:
        padding = (
            "Prompts of different lengths are padded on the left (`tokenizer.pad_token = tokenizer.eos_token`, "
            '`tokenizer.padding_side = "left"`), with their `attention_mask`: masked tokens do not enter the state.'
        )
    else:
        padding = (
            f"Prompts of different lengths cannot be batched: `{form.architecture}` does not read `attention_mask`, so "
            f"that padding on the left enters the state. Padding on the right, for training, changes nothing before it."
        )
    if form.needs_code:
        packing = "Documents packed into one row are kept apart where `position_ids` begin anew with 0 in each."
    else:
        packing = (
            "A row is one document: the recurrent layers of this class carry their state over whatever `position_ids` "
            "say, so do not pack several documents into a row."
        )
    return f"{padding}\n\n{packing}\n"


def _training(config: Config, training: Training) -> str:
    optimizer, schedule, train, data = config.optimizer, config.schedule, config.train, config.data
    warmup = f", {schedule.warmup_steps:,} steps of warm-up" if schedule.warmup_steps else ""
    rows = {
        "data": _data(data),
        "tokenizer": _tokenizer(data),
        "tokens seen": None if training.tokens is None else f"{training.tokens:,}",
        "steps": f"{training.step:,} of {train.steps:,}",
        "batch": f"{train.global_batch_size:,} sequences of {data.sequence_length:,} tokens",
        "optimizer": _optimizer(optimizer),
        "learning rate": f"{optimizer.learning_rate:g}, {schedule.type}{warmup}",
        "precision": "bfloat16, weights and optimizer float32" if train.precision == "bfloat16" else "float32",
        "states carried from step to step": "yes" if train.carry_state else None,
        "seed": train.seed,
    }
    return f"## Training\n\n{_table(rows)}"


def _optimizer(optimizer: OptimizerConfig) -> str:
    first, second = optimizer.betas
    text = f"AdamW, betas {first:g} and {second:g}, epsilon {optimizer.epsilon:g}"
    clip = f", gradients clipped to norm {optimizer.gradient_clip:g}" if optimizer.gradient_clip else ""
    return f"{text}, weight decay {optimizer.weight_decay:g}{clip}"


def _data(data: DataConfig) -> str:
    """Sources by what they are called, without the directories of whoever trained."""
    if data.mixture is None:
        return _source(data.source)
    total = sum(entry.weight for entry in data.mixture.values())
    entries = [
        f"{name} ({entry.weight / total:.1%} of the tokens; {_source(entry.source)})"
        for name, entry in data.mixture.items()
    ]
    changes = "; these shares changed over the run" if any(phase.weights for phase in data.curriculum) else ""
    return ", ".join(entries) + changes


def _source(source: Any) -> str:
    place = getattr(source, "path", None) or getattr(source, "path_prefix", None)
    if source.type == "huggingface" and not PurePath(place).is_absolute():
        further = [source.name, f"split {source.split}", source.revision and f"revision {source.revision}"]
        return f"dataset `{place}` ({', '.join(part for part in further if part)})"
    kind = source.type.replace("_", " ")
    return kind if place is None else f"{kind} `{PurePath(place).name}`"


def _tokenizer(data: DataConfig) -> str:
    tokenizer = data.tokenizer
    if tokenizer.type == "hierarchical_bytes":
        return "bytes, in words"
    path = getattr(tokenizer, "path", None)
    return tokenizer.type if path is None else f"{tokenizer.type} `{PurePath(path).name}`"


def _results(training: Training) -> str:
    """Losses, as far as the run wrote them down."""
    if training.last is None:
        return ""
    rows = []
    for name, figures, prefix in (
        ("training batch", training.last, ""),
        ("held-out documents of the same data", training.evaluated, "held_out_"),
    ):
        loss = figures and figures.get(f"{prefix}loss")
        if loss is not None:
            bits = figures.get(f"{prefix}bits_per_byte")
            rows.append(f"| {name} | {figures['step']:,} | {loss:.4f} | {'' if bits is None else f'{bits:.4f}'} |")
    if not rows:
        return ""
    header = "| | step | nats per token | bits per byte |\n|---|---|---|---|"
    return "\n".join(["## Losses", "", header, *rows]) + "\n"
