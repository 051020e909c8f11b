"""The check of a job's nodes before training."""

from __future__ import annotations

import torch

from pretrain import node_check
from pretrain.node_check import ProcessResult, check_product, judge


def results(**changed: ProcessResult) -> dict[int, ProcessResult]:
    found = {rank: ProcessResult(f"n{rank // 2}", "", 1e12, 0.002) for rank in range(6)}
    return found | {int(rank.removeprefix("rank")): result for rank, result in changed.items()}


def test_nodes_that_are_well() -> None:
    lines, problems = judge(results(), ["n0", "n1", "n2"], 2)
    assert not problems and lines[1] == "node n1: 1 TFLOP/s, a sum of 16 MiB over all 2.0 ms"


def test_a_wrong_node_is_named() -> None:
    lines, problems = judge(results(rank3=ProcessResult("n1", "sums are wrong")), ["n0", "n1", "n2"], 2)
    assert problems == ["node n1, rank 3: sums are wrong"] and lines[1].endswith("BROKEN")


def test_a_missing_node_is_named() -> None:
    found = {rank: result for rank, result in results().items() if rank // 2 != 2}
    _, problems = judge(found, ["n0", "n1", "n2"], 2)
    assert problems == ["node n2: no answer from ranks 4, 5"]


def test_a_slow_node_is_said_and_goes_on() -> None:
    lines, problems = judge(results(rank0=ProcessResult("n0", "", 0.5e12, 0.002)), ["n0", "n1", "n2"], 2)
    assert not problems and "SLOW: the others reach 1" in lines[0]


def test_a_right_product_passes() -> None:
    problem, speed = check_product(torch.device("cpu"), 320)
    assert not problem and speed > 0


def test_a_wrong_product_is_noticed(monkeypatch) -> None:
    multiply = torch.matmul

    def one_bit_off(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        product = multiply(left, right)
        product[17, 5] += 1
        return product

    monkeypatch.setattr(node_check.torch, "matmul", one_bit_off)
    problem, _ = check_product(torch.device("cpu"), 320)
    assert problem == "2 of 640 sums of a matrix product are wrong"


def test_a_product_that_changes_is_noticed(monkeypatch) -> None:
    multiply, calls = torch.matmul, []

    def later_off(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        calls.append(None)
        return multiply(left, right) + (len(calls) > 1)

    monkeypatch.setattr(node_check.torch, "matmul", later_off)
    problem, _ = check_product(torch.device("cpu"), 320)
    assert "different a second time" in problem
