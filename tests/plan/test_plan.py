"""What a plan says about layouts, memory and GPUs, and that it needs no torch."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from pretrain.config import Config
from pretrain.errors import InputError
from pretrain.models.mlstm.config import MLSTMConfig
from pretrain.models.mlstm.cost import cost, recurrent_flops_per_token
from pretrain.plan import GPUS, Plan, model_flops_per_token, plan, print_plan
from pretrain.plan.peak import PARTS

REPOSITORY = Path(__file__).parents[2]
Load = Callable[..., Config]


def _printed(estimate: Plan) -> str:
    text = io.StringIO()
    print_plan(estimate, Console(file=text, width=160))
    return text.getvalue()


def test_plans_and_configurations_import_no_torch() -> None:
    program = (
        "import sys; from pretrain.config import load_config; from pretrain.plan import plan;"
        "from pretrain.plan.search import search; import pretrain.plan.search_report;"
        "plan(load_config('configs/runs/xlstm_7b.yaml'), gpu='h100');"
        "search(load_config('configs/runs/mamba2_tiny.yaml'), 1, 'h100');"
        "found = {'torch', 'megatron', 'deepspeed', 'triton'} & set(sys.modules);"
        "sys.exit(f'imported {sorted(found)}' if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_json_has_the_keys_that_others_read(load: Load) -> None:
    read = json.loads(json.dumps(plan(load("quickstart.yaml")).to_dict()))
    assert read["parameters"] == read["active_parameters"] == 1_879_520
    assert isinstance(read["bytes_per_rank"], int)
    assert read["bytes_per_rank"] == sum(read["bytes_per_rank_by_part"].values())
    assert set(read["bytes_per_rank_by_part"]) == set(PARTS)
    assert read["flops_per_token"] == model_flops_per_token(load("quickstart.yaml"))
    assert read["gpu"] is None


def test_flops_of_a_model_small_enough_to_count_by_hand(load: Load) -> None:
    config = load(
        "quickstart.yaml",
        "data.sequence_length=6",
        "model.vocab_size=264",
        "model.hidden_size=8",
        "model.num_layers=1",
        "model.blocks.mlstm.mixer.num_heads=2",
        "model.blocks.mlstm.mixer.chunk_size=4",
        "model.blocks.mlstm.channel.intermediate_size=16",
    )
    # Queries and keys 4 wide, values and output gate 8, two gates of 2 heads, and the output projection.
    mixer = 2 * (8 * (4 + 4 + 8 + 8 + 2 + 2) + 8 * 8)
    # Two heads of 2 x 4: memory written and read, normaliser read; 4 * 5 / 2 + 2 * 3 / 2 = 13 pairs of 6 tokens.
    cell = 2 * (4 * 2 * 4 + 2 * 2 + 2 * 13 / 6 * (2 + 4))
    swiglu = 2 * 3 * 8 * 16
    head = 2 * 264 * 8
    assert model_flops_per_token(config) == pytest.approx(3 * (mixer + cell + swiglu + head), rel=1e-12)


def test_recurrent_cell_is_the_least_and_a_larger_chunk_costs_more() -> None:
    least = recurrent_flops_per_token(MLSTMConfig(num_heads=8), 4096)
    assert least == 8 * 4 * (256 * 512 + 256)
    work = [
        cost(MLSTMConfig(num_heads=8, chunk_size=chunk), 4096, 8192, 2, 32).scan_flops_per_token
        for chunk in (16, 64, 256)
    ]
    assert least < work[0] < work[1] < work[2]


@pytest.mark.parametrize(
    ("zero", "expected"),
    [
        (0, {"weights": 4, "gradients": 4, "optimizer_moments": 8, "partition_copy": 0}),
        (1, {"weights": 4, "gradients": 4, "optimizer_moments": 2, "partition_copy": 1}),
        (2, {"weights": 4, "gradients": 1, "optimizer_moments": 2, "partition_copy": 1}),
        (3, {"weights": 1, "gradients": 1, "optimizer_moments": 2, "partition_copy": 0}),
    ],
)
def test_zero_splits_what_its_stage_says(load: Load, zero: int, expected: dict[str, int]) -> None:
    """Bytes per parameter over four data-parallel ranks; the tiny model's size is divisible by four."""
    # Two micro-batches each: in the second all gradients are there.
    config = load("quickstart.yaml", f"parallel.zero={zero}", "train.micro_batch_size=2")
    estimate = plan(config, 4)
    parts = estimate.bytes_per_rank_by_part
    assert {part: parts[part] / estimate.parameters for part in expected} == expected
    assert (parts["gathered_weights"] > 0) == (zero == 3)
    assert (parts["communication_buffers"] > 0) == (zero >= 2)


def test_tensor_parallel_ranks_split_all_but_the_norms(load: Load) -> None:
    config = load("quickstart.yaml", "parallel.tensor=2")
    estimate = plan(config, 2)
    # Norms before every mixer and channel mixer, and the last one, stand whole on each rank.
    replicated = (2 * config.model.num_layers + 1) * config.model.hidden_size
    assert estimate.stages[0].parameters == (estimate.parameters - replicated) // 2 + replicated


def test_sequence_parallelism_splits_the_norms_activations(load: Load) -> None:
    whole = plan(load("quickstart.yaml", "parallel.tensor=2"))
    split = plan(load("quickstart.yaml", "parallel.tensor=2", "parallel.sequence=true"))
    assert split.bytes_per_rank_by_part["activations"] < whole.bytes_per_rank_by_part["activations"]
    assert split.bytes_per_rank_by_part["weights"] == whole.bytes_per_rank_by_part["weights"]


def test_pipeline_stages_hold_the_model_once(load: Load) -> None:
    config = load("quickstart.yaml", "parallel.pipeline=4", "train.micro_batch_size=1")
    estimate = plan(config)
    embedding = config.model.vocab_size * config.model.hidden_size
    first, second, third, last = (stage.parameters for stage in estimate.stages)
    assert first + second + third + last == estimate.parameters
    assert second == third == first - embedding == last - embedding - config.model.hidden_size
    assert estimate.micro_batches == 16
    assert estimate.pipeline_bubble_fraction == pytest.approx(3 / 19)
    # The first stage keeps four micro-batches in flight, the second three, and so on.
    activations = [stage.bytes_by_part["activations"] for stage in estimate.stages]
    assert activations[0] * 3 == activations[1] * 4
    assert activations[1] * 2 == activations[2] * 3
    assert ["loss" in stage.bytes_by_moment for stage in estimate.stages] == [False, False, False, True]
    assert estimate.bytes_per_rank == max(stage.bytes for stage in estimate.stages)


def test_few_micro_batches_bound_what_is_in_flight(load: Load) -> None:
    many = plan(load("quickstart.yaml", "parallel.pipeline=4", "train.micro_batch_size=1"))
    one = plan(load("quickstart.yaml", "parallel.pipeline=4", "train.micro_batch_size=1", "train.global_batch_size=1"))
    assert one.stages[0].bytes_by_part["activations"] * 4 == many.stages[0].bytes_by_part["activations"]
    assert one.pipeline_bubble_fraction == pytest.approx(3 / 4)


def test_recomputation_trades_activations_for_flops(load: Load) -> None:
    kept = plan(load("quickstart.yaml", "train.recompute=none"))
    again = plan(load("quickstart.yaml", "train.recompute=block"))
    assert again.bytes_per_rank_by_part["activations"] < kept.bytes_per_rank_by_part["activations"] / 2
    assert again.hardware_flops_per_token > kept.hardware_flops_per_token
    assert again.flops_per_token == kept.flops_per_token
    assert kept.stages[0].activation_bytes == again.stages[0].activation_bytes
    assert kept.stages[0].activation_bytes["none"] == kept.bytes_per_rank_by_part["activations"]
    assert again.stages[0].activation_bytes["block"] == again.bytes_per_rank_by_part["activations"]


def test_optimizer_step_can_be_the_heaviest_moment(load: Load) -> None:
    config = load("quickstart.yaml", "data.sequence_length=4", "train.micro_batch_size=1", "parallel.zero=0")
    estimate = plan(config)
    parts = estimate.bytes_per_rank_by_part
    during_backward = sum(parts[name] for name in ("activations", "logits", "states", "working"))
    # The square roots of the second moments, one float32 a parameter, outgrow what a few tokens need.
    assert during_backward + parts["optimizer_step"] == 4 * estimate.parameters


def test_data_parallel_size_is_what_the_processes_leave(load: Load) -> None:
    config = load("runs/xlstm_7b.yaml")
    assert plan(config, 128).layout["data"] == 64
    assert plan(config).world_size == 2
    with pytest.raises(InputError, match="7 processes cannot hold parallel.tensor=2"):
        plan(config, 7)
    with pytest.raises(InputError, match="at least 1, but is 0"):
        plan(config, 0)
    with pytest.raises(InputError, match="not a multiple of train.micro_batch_size"):
        plan(config, 512)


def test_seven_billion_parameters_fit_where_they_should(load: Load) -> None:
    config = load("runs/xlstm_7b.yaml")
    fits = plan(config, 128, "h100")
    assert fits.gpu is not None and fits.gpu.fits
    assert "fits h100" in _printed(fits)
    alone = load("runs/xlstm_7b.yaml", "parallel.tensor=1", "parallel.sequence=false", "parallel.zero=0")
    # 16 bytes a parameter for weights, gradients and moments are 102 GiB before any activation.
    too_large = plan(alone, 1, "h100")
    assert too_large.gpu is not None and not too_large.gpu.fits
    assert too_large.bytes_per_rank > 16 * too_large.parameters
    assert "does not fit h100" in _printed(too_large)
    assert plan(alone, 1, "mi300x").gpu.fits


def test_peak_rate_bounds_tokens_per_second(load: Load) -> None:
    estimate = plan(load("runs/xlstm_7b.yaml"), 8, "h200")
    expected = 8 * GPUS["h200"].peak_flops_per_second / estimate.flops_per_token
    assert estimate.gpu.tokens_per_second_at_peak == pytest.approx(expected)
    assert estimate.gpu.memory_bytes == GPUS["h200"].memory_bytes


def test_gpu_names(load: Load) -> None:
    config = load("quickstart.yaml")
    assert plan(config, gpu="A100").gpu.name == "a100-80gb"
    assert plan(config, gpu="a100_40gb").gpu.memory_bytes == 40 * 2**30
    assert plan(config, gpu="RTX 4090").gpu.name == "rtx-4090"
    with pytest.raises(InputError, match="unknown GPU 'h10'; did you mean 'h100'"):
        plan(config, gpu="h10")


def test_every_gpu_has_faster_links_within_a_node_and_a_name_of_its_own() -> None:
    names = [gpu.driver_name for name, gpu in GPUS.items() if name != "a100-40gb"]
    assert len(set(names)) == len(names)
    for name, gpu in GPUS.items():
        assert gpu.memory_bytes_per_second > gpu.node_link_bytes_per_second > gpu.network_bytes_per_second, name
        # A card computes between 50 and 500 FLOPs in the time that it reads a byte.
        assert 50 < gpu.peak_flops_per_second / gpu.memory_bytes_per_second < 500, name


def test_tables_show_the_heaviest_stage_and_each_stage(load: Load) -> None:
    text = _printed(plan(load("quickstart.yaml", "parallel.pipeline=2", "train.micro_batch_size=1")))
    assert "1,879,520" in text
    assert re.search(r"Memory of the heaviest rank, on pipeline stage \d, at its heaviest moment: the \w+", text)
    assert "Pipeline stages" in text
    assert "5.9%" in text
