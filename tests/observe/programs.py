"""Programs that run on every rank of a pool of workers."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from data.tokenizers import open_tokenizer
from pretrain import samples
from pretrain.config import parse_config
from pretrain.config.observe import SamplesConfig
from pretrain.models.mixer import Documents
from pretrain.models.state_figures import StateFigures
from pretrain.observe import slow_ranks
from pretrain.observe.profile import profile_run
from pretrain.parallel.topology import build_topology
from pretrain.train import train
from tests.configurations import tiny_config
from tests.conformance.cases import find_case
from tests.conformance.tools import build
from tests.parallel.programs import one_step, open_engine


def slow_rank(parallel: dict[str, Any], waits: str) -> list[str]:
    """What ranks say of themselves where rank 1 takes a tenth of a second a step longer."""
    config = tiny_config(parallel=parallel)
    slow = slow_ranks.SlowRanks(config, build_topology(config))
    said: list[str] = []
    for step in range(slow_ranks.STEPS):
        for kind in ("reading data", "forward and backward"):
            with slow.measure(kind):
                if kind == waits and dist.get_rank() == 1 and step < 2:
                    time.sleep(0.1 * slow_ranks.STEPS / 2)
        said += slow.finish_step()
    return said


def profile(raw: dict[str, Any], steps: int, output: str) -> dict[str, Any] | None:
    """What is measured of a run, as JSON holds it; None on ranks other than 0."""
    measured = profile_run(parse_config(raw, "test"), steps, 1, Path(output))
    return None if measured is None else measured.to_dict(1000)


def states_of_layers(case_names: list[str]) -> dict[str, float]:
    """How far figures of a sequence that is read token by token are from those of the whole, by mixer and figure."""
    differences = {}
    for name in case_names:
        case = find_case(name)
        mixer = build(case)
        generator = torch.Generator().manual_seed(3)
        hidden = torch.randn(9, 2, case.hidden_size, generator=generator)
        starts = torch.zeros(2, 9, dtype=torch.bool)
        starts[:, 0] = starts[0, 4] = True
        mixer.figures = StateFigures()
        mixer(hidden, None, Documents(starts))
        whole, mixer.figures = mixer.figures, StateFigures()
        state = None
        for token in range(9):
            if token == 8:
                # Only what is behind the last token counts of states.
                mixer.figures.sums.pop("state_norm"), mixer.figures.largest.clear()
            _, state = mixer(hidden[token : token + 1], state, Documents(starts[:, token : token + 1]))
        for figure, (total, count) in whole.sums.items():
            other_total, other_count = mixer.figures.sums[figure].tolist()
            assert count == other_count and abs(total) > 1e-6, (name, figure, count, other_count)
            differences[f"{name} {figure}"] = abs(total.item() - other_total) / abs(total.item())
        largest = whole.largest["largest_state"].item()
        differences[f"{name} largest"] = abs(mixer.figures.largest["largest_state"].item() - largest) / largest
    return differences


def step_and_sample(
    overrides: dict[str, dict[str, Any]], wanted: dict[str, Any] | None
) -> tuple[list[Any], list[str] | None]:
    """A step, what the model writes after it (where ``wanted`` says how), and a step more.

    Returns:
        Loss, gradient norm and whether they were applied of both steps, and the texts.
    """
    config = tiny_config(**overrides)
    topology, engine = open_engine(config)
    inputs = engine.decoder.inputs
    if config.model.reads_word_starts:
        engine.decoder.inputs = lambda batch: inputs(dataclasses.replace(batch, word_starts=batch.tokens % 5 == 0))
    steps, texts = [one_step(config, topology, engine, 0)], None
    if wanted is not None:
        settings, tokenizer = SamplesConfig(**wanted), open_tokenizer(config.data.tokenizer)
        before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        texts = samples.sample_texts(engine, tokenizer, settings, seed=5)
        after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        assert torch.equal(before[0], after[0]) and before[1:] == after[1:] and engine.decoder.training
    return [*steps, one_step(config, topology, engine, 1)], texts


def run_with_infinite_logits(raw: dict[str, Any]) -> str:
    """What a run says whose model writes nothing but infinities once it is sampled."""
    original = samples.ModelInTraining.logits

    def broken(self: samples.ModelInTraining, *arguments: Any, **options: Any) -> Any:
        self.decoder.head.weight.data.fill_(float("inf"))
        return original(self, *arguments, **options)

    samples.ModelInTraining.logits = broken
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            train(parse_config(raw, "test"))
    finally:
        samples.ModelInTraining.logits = original
    return output.getvalue()
