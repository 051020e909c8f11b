"""``bench context`` at tiny sizes: messages equal formulas, wrong outcomes are refused; never how fast anything is."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from pretrain import cli
from pretrain.bench import context, context_report, context_traffic
from pretrain.bench import context_steps as steps
from pretrain.bench.context import ContextBenchmark, Settings, TimeRow, Timing, bench_context, measure
from pretrain.bench.context_layers import Sizes
from pretrain.bench.context_processes import Processes, take_turn
from pretrain.errors import CheckError, InputError
from pretrain.models.registry import sequence_mixers
from pretrain.models.segment_messages import SegmentTraffic

TINY = Settings(
    ranks=(2,),
    tokens=64,
    rounds=2,
    sizes=Sizes(hidden_size=32, heads=2, head_size=8, state_size=4, groups=2),
    model_layers=(2,),
    model_hidden_size=32,
)


@pytest.fixture(scope="module")
def result() -> ContextBenchmark:
    """Everything, by processes of its own."""
    return bench_context(TINY)


def drawn(table: Any) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(table)
    return console.file.getvalue()


def test_messages_are_those_of_the_formulas(result: ContextBenchmark) -> None:
    schemes = {
        name: {"chain", "gather", "scan"} if family.config.exchanges_segments else {"chain"}
        for name, family in sequence_mixers().items()
    }
    assert schemes["slstm"] == {"chain"} and schemes["mamba2"] != {"chain"}
    found = {name: {row.scheme for row in result.traffic if row.mixer == name} for name in schemes}
    assert found == schemes
    for row in result.traffic:
        assert row.ranks == 2 and row.counted == row.formula and row.counted.bytes > row.counted.messages > 0
    result.check()
    # By hand: 2 heads with a state of 8 x 16 and a normalizer of 8, a stabilizer and a decay each; both ranks tell.
    (row,) = [row for row in result.traffic if (row.mixer, row.scheme) == ("mlstm", "gather")]
    assert row.counted == SegmentTraffic(4, 4 * 4 * 2 * (8 * 16 + 8 + 2))


def test_a_formula_that_differs_fails_the_command(result: ContextBenchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_message_more(messages: Any, scheme: str, ranks: int) -> SegmentTraffic:
        return context_traffic_exchanged(messages, scheme, ranks) + SegmentTraffic(1, 0)

    context_traffic_exchanged = context_traffic.exchanged
    monkeypatch.setattr(context_traffic, "exchanged", one_message_more)
    family = sequence_mixers()["mamba2"]
    rows = [
        replace(row, formula=context_traffic.formula(family, row.scheme, row.ranks))
        for row in result.traffic
        if row.mixer == "mamba2"
    ]
    assert [row.agrees for row in rows] == [False, False, True]
    assert drawn(context_traffic.traffic_table(rows)).count("DIFFERS") == 2
    wrong = ContextBenchmark(tuple(rows), result.timings)
    monkeypatch.setattr(context_report, "bench_context", lambda settings, say: wrong)
    ended = CliRunner().invoke(cli.app, ["bench", "context", "--ranks", "2", "--json"])
    assert isinstance(ended.exception, CheckError)
    assert "mamba2 by gather over 2 ranks; mamba2 by scan over 2 ranks" in str(ended.exception)
    assert [row["agrees"] for row in json.loads(ended.stdout)["traffic"]] == [False, False, True]
    monkeypatch.setattr("sys.argv", ["pretrain", "bench", "context", "--ranks", "2"])
    with pytest.raises(SystemExit) as exit_code:
        cli.main()
    assert exit_code.value.code == 1


def test_times_are_positive_and_every_scheme_is_there(result: ContextBenchmark) -> None:
    schemes = {timing.title: [row.scheme for row in timing.rows] for timing in result.timings}
    both, one = ["gather", "scan", "chain", "all-to-all"], ["gather", "chain", "all-to-all"]
    assert [found[1:] for found in schemes.values()] == [both, both, one, one, ["gather", "chain"]]
    for timing in result.timings:
        alone, *others = timing.rows
        assert (alone.scheme, alone.ranks, alone.messages) == ("one process", 1, 0)
        assert timing.ratios(alone) == [1.0, 1.0]
        for row in timing.rows:
            assert len(row.seconds) == len(row.processor_seconds) == 2
            assert all(0 < value < math.inf for value in (*row.seconds, *row.processor_seconds))
            assert 0 <= row.difference <= context.TOLERANCE
        for row in others:
            assert row.ranks == 2 and row.messages > 0 and row.bytes > 0
            assert timing.ratios(row) == [
                2 * took / base for took, base in zip(row.seconds, alone.seconds, strict=True)
            ]
        text = drawn(context_report.time_table(timing, available=1))
        assert timing.title in text and text.count("2*") == len(others) and "…" not in text
    # Something was computed in another order, so that the comparison with one process was one.
    assert max(row.difference for timing in result.timings for row in timing.rows) > 0


def test_bytes_of_all_to_all(result: ContextBenchmark) -> None:
    timing = result.timings[0]
    assert timing.name == "mlstm"
    (row,) = [row for row in timing.rows if row.scheme == "all-to-all"]
    # Forward and backward each rank has half of its 32 tokens' inputs and outputs from the other one.
    channels = 2 * (4 + 4 + 8 + 1 + 1) + 2 * 8
    assert (row.messages, row.bytes) == (8, 2 * 2 * 32 * channels * 4 // 2)


def test_a_chain_waits_for_its_ends() -> None:
    rows = tuple(TimeRow(scheme, ranks, 0, 0, 0.0) for scheme, ranks in (("chain", 4), ("gather", 4), ("chain", 1)))
    timing = Timing("model", "", 64, 8, rows)
    assert [timing.at_best(row) for row in rows] == [11 / 8, 1.0, 1.0]


class FakeProcesses:
    """Answers as two ranks would whose second one has a wrong gradient."""

    def __init__(self, size: int, difference: float):
        self.size, self.difference, self.turns = size, difference, 0

    def call(self, function: Callable[..., Any], **arguments: Any) -> list[Any]:
        self.turns += function is take_turn
        if function is steps.compare:
            return [{"output": 0.0}, {"output": 0.0, "gradient of skip": self.difference}][: self.size]
        return [{}] * self.size if function is steps.received else [(0.0, 1.0, 1.0)] * self.size


@pytest.mark.parametrize("difference", [2e-4, math.nan, math.inf])
def test_a_wrong_contestant_is_not_timed(difference: float) -> None:
    def hold(processes: FakeProcesses) -> list[list[str]]:
        return [["one process" if processes.size == 1 else "scan"]] * processes.size

    groups = {1: FakeProcesses(1, 0.0), 2: FakeProcesses(2, difference)}
    with pytest.raises(CheckError, match="cell: scan over 2 ranks is wrong: gradient of skip differs"):
        measure(groups, "mlstm", "cell", 1, TINY, 64, hold)
    assert groups[1].turns == groups[2].turns == 0
    right = {1: FakeProcesses(1, 0.0), 2: FakeProcesses(2, 1e-5)}
    assert measure(right, "mlstm", "cell", 1, TINY, 64, hold).rows[1].difference == 1e-5
    assert right[1].turns == right[2].turns == TINY.rounds


def test_ranks_that_fail_are_named_and_ended() -> None:
    processes = Processes(2)
    children = list(processes._processes)
    with pytest.raises(RuntimeError, match="(?s)(rank [01] of 2: .*KeyError: 'nothing'.*){2}"):
        processes.call(take_turn, name="nothing")
    assert not any(child.is_alive() for child in children)


def test_json_holds_everything(result: ContextBenchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Settings] = []
    monkeypatch.setattr(context_report, "bench_context", lambda settings, say: asked.append(settings) or result)
    arguments = ["--ranks", "1, 2", "--tokens", "64", "--only", "mlstm", "--rounds", "3", "--threads", "2", "--json"]
    ended = CliRunner().invoke(cli.app, ["bench", "context", *arguments], catch_exceptions=False)
    assert ended.exit_code == 0
    assert asked == [Settings((1, 2), 64, ("mlstm",), 3, 2)]
    found = json.loads(ended.stdout)
    assert (found["device"], found["threads"], found["ranks"], found["tokens"], found["rounds"]) == (
        "cpu", 2, [1, 2], 64, 3,
    )  # fmt: skip
    assert found["cores"] >= 1 and set(found["versions"]) == {"torch", "megatron-core"}
    assert len(found["traffic"]) == len(result.traffic) and all(row["agrees"] for row in found["traffic"])
    assert set(found["times"][0]["rows"][1]) == {
        *("scheme", "ranks", "messages", "bytes", "difference", "seconds", "processor_seconds"),
        *("ratios_to_ideal", "ratio_at_best", "processor_ratios"),
    }
    text = CliRunner().invoke(cli.app, ["bench", "context", "--ranks", "2"], catch_exceptions=False)
    assert text.exit_code == 0 and all(timing.title in text.stdout for timing in result.timings)


def test_what_cannot_be_is_said() -> None:
    for text in ("", "1,,2", "0,2", "-1", "2.5", "two"):
        with pytest.raises(InputError, match="--ranks .* must be whole numbers above 0"):
            context_report.parse_ranks(text)
    with pytest.raises(InputError, match="--tokens 100: must be a multiple of 16, .* over 1 and 2 and 4 ranks; 96 is"):
        bench_context(Settings(ranks=(2, 4), tokens=100))
    with pytest.raises(InputError, match="--only 'lstm': must be one of attention, .*, model"):
        bench_context(Settings(only=("mlstm", "lstm")))
