"""Every run that ships is as long as its comment says, starts as its command says, and fits the GPUs that it names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pretrain.config import load_config
from pretrain.config.layout import check_world_size
from pretrain.plan import plan
from tests.plan.conftest import CONFIGS

RUNS = sorted((CONFIGS / "runs").glob("*.yaml"))
TRAINED_ON_CLUSTERS = [path for path in RUNS if "megatron_indexed" in path.read_text()]
UNITS = {"B": 1e9, "T": 1e12}


def _comment(path: Path) -> str:
    lines = [line for line in path.read_text().splitlines() if line.startswith("#")]
    return " ".join(line.removeprefix("#").strip() for line in lines)


def _processes(path: Path) -> int:
    """Processes that the command in a file's comment starts."""
    (command,) = re.findall(r"^#\s+(\S.* -m pretrain train configs/\S+)$", path.read_text(), re.MULTILINE)
    sizes = [re.search(rf"--{option} (\d+)", command) for option in ("nnodes", "nproc-per-node")]
    nodes, processes = (int(size[1]) if size else 1 for size in sizes)
    return nodes * processes


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_command_starts_as_many_processes_as_the_run_can_share(path: Path) -> None:
    assert check_world_size(load_config(path), _processes(path)) is None


@pytest.mark.parametrize("path", TRAINED_ON_CLUSTERS, ids=lambda path: path.stem)
def test_run_fits_the_gpus_it_names_and_reads_the_tokens_it_names(path: Path) -> None:
    config = load_config(path)
    (gpus, gpu), (tokens, unit) = (
        re.search(pattern, _comment(path)).groups()
        for pattern in (r"--gpus (\d+) --gpu (\w+)", r" on ([\d.]+)([BT]) tokens")
    )
    estimate = plan(config, int(gpus), gpu)
    assert int(gpus) == _processes(path)
    assert estimate.gpu.fits, f"{estimate.bytes_per_rank / 2**30:.1f} GiB a rank"
    # Comments round.
    assert estimate.training_tokens == pytest.approx(float(tokens) * UNITS[unit], rel=0.06)
    assert (config.train.precision, config.optimizer.betas) == ("bfloat16", (0.9, 0.95))


def test_the_paper_s_batches_and_rates() -> None:
    """Figures that are published, against typing errors."""
    published = {
        "xlstm_7b": (512, 8192, 4e-4, 0.5),
        "xlstm_7_1_125m": (256, 2048, 1.5e-3, 1.0),
        "mamba2_1.3b": (256, 2048, 1e-3, 1.0),
        "para_gru_1b": (256, 2048, 3e-3, 1.0),
        "nemotron_h_8b": (768, 8192, 8e-4, 1.0),
        "bamba_9.8b": (384, 4096, 3e-4, 1.0),
    }
    for name, figures in published.items():
        config = load_config(CONFIGS / f"runs/{name}.yaml")
        found = (config.train.global_batch_size, config.data.sequence_length)
        assert (*found, config.optimizer.learning_rate, config.optimizer.gradient_clip) == figures
