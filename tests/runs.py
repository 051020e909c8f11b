"""Real runs for tests: a small corpus, a configuration file on it, and the command in processes of its own."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.configurations import TINY_MODEL

WORDS = "the state of a recurrent model is carried from token to token until a document ends".split()


def write_corpus(directory: Path, documents: int = 60) -> Path:
    """Text files that a model can learn from in a few steps."""
    directory.mkdir(parents=True, exist_ok=True)
    source = random.Random(0)
    for index in range(documents):
        text = " ".join(source.choices(WORDS, k=source.randint(20, 120)))
        (directory / f"{index:03}.txt").write_text(text + "\n")
    return directory


def raw_config(directory: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A run of a dozen steps over :func:`write_corpus`; ``sections`` add to or replace its keys."""
    model = json.loads(json.dumps(TINY_MODEL)) | {"hidden_size": 32, "num_layers": 2}
    raw: dict[str, Any] = {
        "run": {"directory": str(directory / "run")},
        "model": model,
        "data": {
            "source": {"type": "text_files", "path": str(directory / "corpus"), "pattern": "*.txt"},
            "tokenizer": {"type": "bytes"},
            "sequence_length": 32,
            "held_out_fraction": 0.2,
        },
        "parallel": {"zero": 1},
        "optimizer": {"learning_rate": 3e-3, "epsilon": 1e-5},
        "schedule": {"warmup_steps": 2},
        "train": {
            "steps": 12,
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "device": "cpu",
            "evaluate_every": 6,
            "evaluate_samples": 8,
            "checkpoint_every": 4,
            "keep_last": 10,
        },
    }
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section}
    return raw


def write_config(directory: Path, **sections: dict[str, Any]) -> Path:
    """The same as a file, its corpus beside it."""
    if not (directory / "corpus").exists():
        write_corpus(directory / "corpus")
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(raw_config(directory, **sections)))
    return path


def environment() -> dict[str, str]:
    """For a process of its own: one thread, and no rank of a surrounding launcher."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def pretrain_command(*arguments: object, processes: int = 0) -> list[str]:
    """``python -m pretrain ...``, under torchrun where ``processes`` is given."""
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*launcher, "-m", "pretrain", *map(str, arguments)]


def pretrain(*arguments: object, processes: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end."""
    command = pretrain_command(*arguments, processes=processes)
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)


def curve(run: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm by step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines}), "a step stands twice"
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines}
