"""``bench kernels`` at tiny sizes: equal work, rows, bounds, missing peers; never how fast anything is."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from pretrain import cli
from pretrain.bench import cells_cpu, cells_cuda, cells_models, cells_peers, kernels
from pretrain.bench.cells import Bounds, Entry, Problem
from pretrain.bench.contestants import Contestant, PeerMissing, our_model, our_step
from pretrain.bench.train import Measurement, count_flops
from pretrain.errors import InputError

TINY = cells_cpu.Sizes(
    mlstm=(1, 2, 64, 16, 16),
    chunks=(16, 32),
    newton=((2, 8, (16,)), (1, 6, (33,))),
    slstm=(2, 2, 12, 8),
    mamba2=cells_models.Mamba2Workload(
        batch_size=2, sequence_length=24, hidden_size=32, num_layers=2, vocab_size=48, head_size=16, state_size=8
    ),
    square=(16, 16, 16),
    copied=1024,
)
# What runs on a CUDA device, on the CPU.
TINY_CUDA = cells_cuda.Sizes(
    batch=2,
    tokens=32,
    width=16,
    mlstm=(2, 16, 16),
    mlstm_chunks=(16,),
    ssd=(4, 8, 8, 2),
    ssd_chunks=(16,),
    newton_tokens=(16,),
    slstm=(2, 12),
    square=16,
    copied=1024,
    backend="torch",
    device="cpu",
    dtype=torch.float32,
)
KERNELS = ["mlstm", "mamba2", "para_gru", "para_lstm", "slstm"]
PEER_MODULES = ("MLSTM_MODULE", "SLSTM_MODULE", "SSD_MODULE", "SIMPLE_GLA_MODULE")


@pytest.fixture
def no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PEER_MODULES:
        monkeypatch.setattr(cells_peers, name, "no_such_package.module")


def run_suite(suite, bounds, rounds: int = 1) -> list[kernels.Result]:
    return kernels.bench_kernels(suite, bounds, rounds, "processor")


def drawn(results: list[kernels.Result]) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(kernels.table(results))
    return console.file.getvalue()


def problem_of(*entries: Entry, flops: float = 0.0, moved: float = 0.0) -> Problem:
    return Problem("kernel", "sizes", 7, flops, moved, entries)


def sleeper() -> Contestant:
    return Contestant("", lambda: None, lambda: None, 0)


def failing() -> Contestant:
    raise RuntimeError("no such instruction\nsecond line")


def test_every_kernel_has_rows_of_what_was_measured(no_peers: None):
    lines: list[str] = []
    results = kernels.bench_kernels(cells_cpu.suite(TINY), cells_cpu.bounds(TINY), 2, "wall", lines.append)
    assert list(dict.fromkeys(result.problem.kernel for result in results)) == KERNELS
    assert [result.problem.tokens for result in results] == [64, 24, 16, 33, 16, 33, 12]
    assert len(lines) == len(results)
    for result in results:
        ours = result.rows[0]
        assert ours.missing is None
        assert result.ratios(ours) == [1.0, 1.0]
        assert all(share > 0 and math.isfinite(share) for share in result.shares(ours))
        for row in result.rows:
            assert (row.missing is None) == (len(row.seconds) == len(row.processor_seconds) == 2)
        found = json.loads(json.dumps(result.to_dict()))
        assert found["rows"][ours.name]["seconds"] == list(ours.seconds)
        assert ours.name in drawn([result])


def test_missing_peers_are_rows_that_say_how_to_install_them(no_peers: None):
    suite = kernels.select(cells_cpu.suite(TINY), ["mlstm", "slstm"])
    for result, count in zip(run_suite(suite, cells_cpu.bounds(TINY)), (4, 1), strict=True):
        missing = [row for row in result.rows if row.missing]
        assert len(missing) == count
        for row in missing:
            assert "pip install 'recurrent-pretrain[bench]'" in row.missing
            assert f"{row.name}: {row.missing}" in drawn([result])
            assert result.ratios(row) == []
            assert result.to_dict()["rows"][row.name]["missing"] == row.missing


def test_a_peer_that_fails_is_a_row_and_ours_is_not():
    bounds = cells_cpu.bounds(TINY)
    problem = problem_of(Entry("ours", sleeper), Entry("theirs", failing, is_peer=True))
    row = kernels.measure(problem, bounds, 1, "wall").rows[1]
    assert row.missing == "does not run here: RuntimeError: no such instruction"
    with pytest.raises(RuntimeError, match="no such instruction"):
        kernels.measure(problem_of(Entry("ours", failing)), bounds, 1, "wall")


def test_rounds_take_turns_after_one_for_warming_up():
    calls: list[str] = []

    def entry(name: str) -> Entry:
        return Entry(name, lambda: Contestant("", lambda: calls.append(name), lambda: calls.append("-"), 0))

    bounds = Bounds(entry("product").build(), 1.0, entry("copy").build(), 1.0)
    kernels.measure(problem_of(entry("ours"), entry("theirs")), bounds, 2, "wall")
    once = ["-", "ours", "-", "theirs", "-", "product", "-", "copy"]
    assert calls == 3 * once


def test_ratios_shares_and_bounds_are_taken_within_a_round():
    ours = Measurement("ours", seconds=(2.0, 4.0), processor_seconds=(1.0, 1.0))
    theirs = Measurement("theirs", seconds=(6.0, 4.0), processor_seconds=(1.0, 2.0))
    problem = problem_of(flops=100.0, moved=30.0)
    result = kernels.Result(problem, (ours, theirs), (100.0, 50.0), (20.0, 30.0), "wall")
    assert result.ratios(theirs) == [3.0, 1.0]
    assert result.bounds() == [(1.0, 1.5), (2.0, 1.0)]
    assert result.shares(ours) == [0.75, 0.5]
    assert result.bound_by() == "products"
    assert replace(result, copy_rates=(10.0, 10.0)).bound_by() == "bytes"
    assert replace(result, clock="processor").ratios(theirs) == [1.0, 2.0]
    text = drawn([result])
    assert "2.00 (1.00 .. 3.00)" in text and "3,000.0" in text


@pytest.mark.parametrize("kernel", ["para_gru", "para_lstm"])
def test_newton_and_the_loop_do_the_same_work(kernel: str):
    for build in cells_cpu.suite(TINY)[kernel]:
        newton, loop = (entry.build().run() for entry in build().entries)
        for ours, theirs in zip(newton, loop, strict=True):
            assert ours.abs().max() > 0
            # Newton stops at a residual, float32 sums are in another order.
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-4)


def test_peers_do_the_same_work():
    pytest.importorskip("mlstm_kernels.torch.chunkwise")
    pytest.importorskip("xlstm.blocks.slstm.cell")
    (mlstm,), (slstm,) = (cells_cpu.suite(TINY)[name] for name in ("mlstm", "slstm"))
    entries = mlstm().entries
    ours, *others = (entry.build().run()[0] for entry in entries)
    for entry, other in zip(entries[1:], others, strict=True):
        output = other.transpose(1, 2) if entry.is_peer else other
        torch.testing.assert_close(output, ours, rtol=1e-4, atol=1e-5)
    (output, of_gates, of_recurrent, of_bias), theirs = (entry.build().run() for entry in slstm().entries)
    torch.testing.assert_close(theirs[0].transpose(1, 2), output, rtol=1e-4, atol=1e-5)
    assert theirs[1].shape == of_gates.flatten(2).shape
    assert theirs[2].numel() == of_recurrent.numel() and theirs[3].numel() == of_bias.numel()


def test_transformers_model_has_our_weights_and_our_loss():
    class OneDocumentPerRow(cells_models.Mamba2Workload):
        def batch(self):
            batch = super().batch()
            batch.document_starts[:, 1:] = False
            return batch

    workload = OneDocumentPerRow(**vars(TINY.mamba2))
    ours = our_model(workload)
    theirs = cells_models.transformers_step(workload, cells_models.transformers_model(workload, ours, chunk=8))
    # Same weights, same function: float32 sums in another order.
    assert theirs.run() == pytest.approx(our_step(workload, ours).run(), rel=1e-5)


def test_least_work_is_no_more_than_what_is_done():
    suite = cells_cpu.suite(TINY)
    for kernel in ("mlstm", "slstm"):
        problem = suite[kernel][0]()
        contestant = problem.entries[0].build()
        assert 0 < problem.flops <= count_flops(contestant), kernel
        inputs = 4 * sum(tensor.numel() for tensor in contestant.run())
        assert problem.bytes > inputs, f"{kernel}: less than the output and gradients that it writes"


def test_what_runs_on_a_cuda_device_runs(no_peers: None):
    results = run_suite(cells_cuda.suite(TINY_CUDA), cells_cuda.bounds(TINY_CUDA))
    assert [result.problem.kernel for result in results] == ["mlstm", "ssd", "para_gru", "para_lstm", "slstm"]
    missing = {row.name: row.missing for result in results for row in result.rows if row.missing}
    assert len(missing) == 4 and all("pip install" in reason for reason in missing.values())
    for result in results:
        assert result.rows[0].missing is None and result.problem.bytes > 0
    # torch's own recurrences stand in for cuDNN's.
    assert all(len(result.rows[1].seconds) == 1 for result in results[2:])


def test_kernels_of_seven_billion_parameters_are_listed_without_a_device():
    problems = [build() for builds in cells_cuda.suite().values() for build in builds]
    assert all(problem.bytes > 1e9 and "bfloat16" in problem.description for problem in problems)


def test_only_takes_names_of_kernels():
    suite = cells_cpu.suite(TINY)
    assert list(kernels.select(suite, ["slstm", "mlstm"])) == ["mlstm", "slstm"]
    assert list(kernels.select(suite, [])) == KERNELS
    with pytest.raises(InputError, match="mlstm, mamba2, para_gru"):
        kernels.select(suite, ["slstm", "gru"])


def test_threads_are_set_back():
    before = torch.get_num_threads()
    with pytest.raises(PeerMissing), kernels.threads_of(before + 1):
        assert torch.get_num_threads() == before + 1
        raise PeerMissing
    assert torch.get_num_threads() == before


def test_command_prints_json_of_what_was_asked_for(monkeypatch: pytest.MonkeyPatch, no_peers: None):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    suite, bounds = cells_cpu.suite(TINY), cells_cpu.bounds(TINY)
    monkeypatch.setattr(cells_cpu, "suite", lambda: suite)
    monkeypatch.setattr(cells_cpu, "bounds", lambda: bounds)
    asked = ["bench", "kernels", "--only", "slstm", "--only", "para_gru", "--rounds", "1", "--json"]
    shown = json.loads(CliRunner().invoke(cli.app, asked).stdout)
    assert (shown["device"], shown["clock"], shown["threads"]) == ("cpu", "processor", 1)
    assert [result["kernel"] for result in shown["results"]] == ["para_gru", "para_gru", "slstm"]
    table = CliRunner().invoke(cli.app, [*asked[:4], "--rounds", "1"]).stdout
    assert "slstm: batch 2" in table and "GFLOP/s of a large product" in " ".join(table.split())


def test_compile_goes_with_no_other_output():
    with pytest.raises(InputError, match="--only"):
        CliRunner().invoke(cli.app, ["bench", "kernels", "--compile", "--json"], catch_exceptions=False)
