"""The search for layouts: it finds those that a run can have and that fit, and says why not of the others."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pretrain.cli import app
from pretrain.config import Config, load_config
from pretrain.errors import InputError
from pretrain.plan import GPUS, plan
from pretrain.plan.gpus import GPU, USABLE_FRACTION
from pretrain.plan.search import Search, divisors, search, with_layout
from tests.configurations import tiny_config

CONFIGS = Path(__file__).parents[2] / "configs/runs"
CONFIG = CONFIGS / "mamba2_tiny.yaml"
MIB = 2**20
MOE = {"type": "moe", "num_experts": 4, "intermediate_size": 32, "router_size": 16}
EXPERTS = {"num_layers": 2, "blocks": {"mlstm": {"mixer": {"type": "mlstm", "num_heads": 4}, "channel": MOE}}}


@pytest.fixture
def small_gpu(monkeypatch: pytest.MonkeyPatch) -> int:
    """A GPU named ``small`` that holds some layouts of the tiny model and not others; its usable bytes."""
    gpu = GPU(int(6 * MIB / USABLE_FRACTION), 1e9, 1e9, 1e8, 1e7, 8, "small")
    monkeypatch.setitem(GPUS, "small", gpu)
    return int(gpu.memory_bytes * USABLE_FRACTION)


def _tiny(**sections: Any) -> Config:
    model = {"vocab_size": 264, "hidden_size": 64, "num_layers": 2, "layers": ["mlstm"]}
    model["blocks"] = {"mlstm": {"mixer": {"type": "mlstm", "num_heads": 2}, "channel": {"type": "swiglu"}}}
    data = {"source": {"type": "standard_library"}, "tokenizer": {"type": "bytes"}, "sequence_length": 128}
    return tiny_config(**{"model": model, "data": data} | sections)


def _accounted(found: Search) -> int:
    return len(found.fitting) + sum(refusal.layouts for refusal in found.refusals)


def test_search_finds_all_that_configurations_allow_and_that_fit(small_gpu: int) -> None:
    """Each of the layouts of two processes, validated and planned one by one."""
    expected, tried = {}, 0
    for tensor, pipeline, context in [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)]:
        data = 2 // (tensor * pipeline * context)
        choices = itertools.product((False, True)[:tensor], range(4), divisors(8 // data), ("none", "block"))
        for sequence, zero, size, recompute in choices:
            tried += 1
            parallel = {"tensor": tensor, "sequence": sequence, "pipeline": pipeline, "context": context, "zero": zero}
            train = {"steps": 5, "global_batch_size": 8, "micro_batch_size": size, "recompute": recompute}
            try:
                planned = plan(_tiny(parallel=parallel | {"data": data}, train=train), 2, "small")
            except InputError:
                continue
            if planned.gpu.fits:
                expected[tensor, sequence, pipeline, context, zero, size, recompute] = planned
    found = search(_tiny(), 2, "small")
    by_layout = {}
    for candidate in found.fitting:
        layout = candidate.layout
        cut = (layout.tensor, layout.sequence, layout.pipeline, layout.context)
        by_layout[*cut, layout.zero, layout.micro_batch_size, layout.recompute] = candidate
    # What fits without recomputation is not recomputed.
    wanted = {key for key in expected if key[-1] == "none" or (*key[:-1], "none") not in expected}
    assert by_layout.keys() == wanted and 20 < len(wanted) < tried
    for key, candidate in by_layout.items():
        planned = expected[key]
        assert candidate.bytes_per_rank == planned.bytes_per_rank <= small_gpu
        assert candidate.step.total == pytest.approx(planned.speed.step.total)
        assert candidate.tokens_per_second == pytest.approx(planned.speed.tokens_per_second_unhidden)
        assert candidate.pipeline_bubble_fraction == planned.pipeline_bubble_fraction
    assert found.layouts == tried == _accounted(found)
    totals = [float(f"{candidate.step.total:.3e}") for candidate in found.fitting]
    assert totals == sorted(totals) and len(set(totals)) > 10


def test_best_cut_the_model_differently(small_gpu: int) -> None:
    found = search(_tiny(), 4, "small")
    best = found.best(10)
    assert best[0] == found.fitting[0]
    assert len({candidate.layout.split for candidate in best}) == len(best) > 3


def test_reasons_say_what_does_not_divide_or_fit(small_gpu: int) -> None:
    reasons = {refusal.reason: refusal.layouts for refusal in search(_tiny(), 8, "small").refusals}
    (heads,) = [reason for reason in reasons if "num_heads=2 is not divisible by parallel.tensor=4" in reason]
    # With and without sequence parallelism and recomputation: tensor 4 over two data-parallel ranks, with context 2, or
    # with pipeline 2, which goes with two ZeRO stages alone; and tensor 8. So many micro-batch sizes divide 4 and 8.
    assert reasons[heads] == 2 * 2 * (4 * 3 + 4 * 4 + 2 * 4 + 4 * 4)
    assert any("num_layers=2 is fewer than parallel.pipeline=4" in reason for reason in reasons)
    assert any("zero=2 does not go with pipeline=2" in reason for reason in reasons)
    two = [refusal.reason for refusal in search(_tiny(), 2, "small").refusals]
    assert any(re.fullmatch(r"zero=0, recompute=none: needs \d+\.\d\d MiB or more", reason) for reason in two)
    uneven = search(_tiny(train={"steps": 5, "global_batch_size": 9, "micro_batch_size": 1}), 2, "small")
    assert "train.global_batch_size=9 does not divide over 2 data-parallel ranks" in {
        refusal.reason for refusal in uneven.refusals
    }


def test_experts_are_split_where_there_are_some(small_gpu: int) -> None:
    found = search(_tiny(model=_tiny().model.model_dump() | EXPERTS), 4, "h100")
    assert {candidate.layout.expert for candidate in found.fitting} == {1, 2, 4}
    assert {candidate.layout.expert for candidate in search(_tiny(), 4, "h100").fitting} == {1}


def test_seven_billion_parameters_are_cut_until_they_fit() -> None:
    """On cards of 40 GB weights, gradients and moments of 16 bytes a parameter, 102 GiB, fit only in parts."""
    found = search(load_config(CONFIGS / "xlstm_7b.yaml", ["train.global_batch_size=16"]), 8, "a100-40gb")
    assert found.fitting and _accounted(found) == found.layouts
    for candidate in found.fitting:
        layout = candidate.layout
        assert candidate.bytes_per_rank <= found.usable_bytes
        assert layout.zero == 3 or layout.tensor * layout.pipeline > 1


def _run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def test_command_writes_a_layout_that_others_build_on(tmp_path: Path) -> None:
    target = tmp_path / "layout.yaml"
    done = _run(CONFIG, "--gpus", 2, "--gpu", "l4", "--search", "--write", target, "--json")
    assert done.exit_code == 0, done.output
    first = json.loads(done.output)["fitting"][0]
    run = tmp_path / "run.yaml"
    run.write_text(json.dumps({"base": [str(CONFIG), target.name]}))
    planned = plan(load_config(run), 2, "l4")
    assert planned.bytes_per_rank == first["bytes_per_rank"]
    assert planned.layout["tensor"] == first["layout"]["tensor"] and planned.layout["zero"] == first["layout"]["zero"]
    assert planned.speed.step.total == pytest.approx(first["step"]["total"])
    again = _run(CONFIG, "--gpus", 2, "--gpu", "l4", "--search", "--write", target)
    assert isinstance(again.exception, InputError) and "is there already" in str(again.exception)
    # Under four processes it says what it was made for.
    with pytest.raises(InputError, match="parallel.data="):
        plan(load_config(run), 4)


def test_command_prints_the_best_and_the_reasons() -> None:
    done = _run(CONFIG, "--gpus", 4, "--gpu", "h100", "--search")
    assert done.exit_code == 0, done.output
    assert "layouts of 4 x h100 fit" in done.output and "What is left out" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--search"], "--search needs --gpus"),
        (["--search", "--gpus", "0", "--gpu", "h100"], "at least 1, but is 0"),
        (["--write", "layout.yaml"], "give --search too"),
        (["--search", "--gpus", "1", "--gpu", "h100", "--write", "no/layout.yaml"], "no such folder"),
        (["parallel.zero=2", "--search", "--gpus", "1", "--gpu", "h100", "--write", "layout.yaml"], "stands above"),
    ],
)
def test_command_says_what_is_missing(arguments, message, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = _run(CONFIG, *arguments)
    assert isinstance(done.exception, InputError) and message in str(done.exception)
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_where_nothing_is_allowed(tmp_path: Path) -> None:
    """Chunks cannot be cut, and neither 7 data-parallel nor 7 tensor-parallel ranks divide the batch or the heads."""
    arguments = ["--search", "--gpus", 7, "--gpu", "h100", "--write", tmp_path / "layout.yaml"]
    done = _run(CONFIGS / "hnet_1stage_tiny.yaml", *arguments)
    assert isinstance(done.exception, InputError) and "no layout of 7 x h100 fits" in str(done.exception)
    assert not list(tmp_path.iterdir())


def test_layouts_change_only_what_they_name() -> None:
    config = _tiny()
    candidate = search(config, 1, "h100").fitting[0]
    changed = with_layout(config, candidate.layout)
    assert changed.model == config.model and changed.data == config.data
    kept = config.train.model_dump() | {"micro_batch_size": 0, "recompute": ""}
    assert changed.train.model_dump() | {"micro_batch_size": 0, "recompute": ""} == kept
