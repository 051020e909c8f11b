"""``pretrain bench``: speed, with a peer in the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pretrain.errors import InputError

app = typer.Typer(help="Measure speed, with a peer beside us in the same run.", no_args_is_help=True)


@app.command("train")
def bench_train(
    rounds: Annotated[int, typer.Option(min=1, help="interleaved rounds; the median is printed")] = 7,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, every round's figures")] = False,
) -> None:
    """Tokens/s of forward and backward beside the xlstm package and the machine's own matrix products."""
    from pretrain.bench.train import print_bench_train

    print_bench_train(rounds, as_json)


@app.command("kernels")
def bench_kernels(
    only: Annotated[
        list[str] | None,
        typer.Option(help="a kernel to time, can be given several times; default: all", metavar="NAME"),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="interleaved rounds; the median is printed")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="of torch on the CPU")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, every round's figures")] = False,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="time nothing; compile the Triton kernels for sm_80, sm_90 and sm_100, no GPU needed, and print "
            "registers, spills and shared memory",
        ),
    ] = False,
) -> None:
    """Time of forward and backward of each cell beside its peers, and beside what bounds it on this machine."""
    from pretrain.bench.kernels import print_bench_kernels, print_compiled_kernels

    if compiled and (only or as_json):
        raise InputError("--compile prints one table of all kernels: leave out --only and --json")
    if compiled:
        print_compiled_kernels()
    else:
        print_bench_kernels(only or [], rounds, threads, as_json)


@app.command("data")
def bench_data(
    tokens: Annotated[int, typer.Option(min=1_000_000, help="of the random corpus that is read")] = 100_000_000,
    rounds: Annotated[int, typer.Option(min=1, help="interleaved rounds; the median is printed")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, every round's figures")] = False,
) -> None:
    """Tokens/s of our batches beside Megatron's, datasets' and others', start-up, and tokenizing."""
    from pretrain.bench.data import print_bench_data

    print_bench_data(tokens, rounds, as_json)


@app.command("checkpoint")
def bench_checkpoint(
    parameters: Annotated[str, typer.Option(help="of the model, for instance 200M", metavar="COUNT")] = "200M",
    ranks: Annotated[int, typer.Option(min=1, help="processes, on the CPU; ZeRO-1 over all of them")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="rounds in which all take turns; the median is printed")] = 3,
    directory: Annotated[Path, typer.Option(help="on the file system to measure; left as it was")] = Path("."),
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, every round's figures")] = False,
) -> None:
    """How long training waits for a checkpoint: ours, DeepSpeed's and torch's, written meanwhile or not."""
    from pretrain.bench.checkpoint import print_bench_checkpoint

    print_bench_checkpoint(parameters, ranks, rounds, directory, as_json)


@app.command("context")
def bench_context(
    ranks: Annotated[str, typer.Option(help="numbers of processes, with commas between; 1 is always among them")] = (
        "1,2,4"
    ),
    tokens: Annotated[int, typer.Option(min=1, help="of the one sequence; attention and models have a fourth")] = 8192,
    only: Annotated[
        list[str] | None,
        typer.Option(help="a mixer, or model, can be given several times; default: all", metavar="NAME"),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="interleaved rounds; the median is printed")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="of torch in each process")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, every round's figures")] = False,
) -> None:
    """One sequence over several processes, which it starts itself: messages beside the formulas, and time of a step
    beside the ideal, a chain of ranks and all-to-all over heads."""
    from pretrain.bench.context import Settings
    from pretrain.bench.context_report import parse_ranks, print_bench_context

    settings = Settings(parse_ranks(ranks), tokens, tuple(only or ()), rounds, threads)
    print_bench_context(settings, as_json)


@app.command("equal-compute")
def bench_equal_compute(
    configs: Annotated[
        list[str], typer.Argument(help="YAML files of runs; dotted overrides hold for all", metavar="CONFIG...")
    ],
    flops: Annotated[float, typer.Option(min=1, help="useful work of each, forward and backward")] = 6e11,
    directory: Annotated[Path, typer.Option(help="where the runs are kept, and gone on with")] = Path(
        "runs/equal_compute"
    ),
    samples: Annotated[int, typer.Option(min=1, help="held-out samples, at most, spread over the split")] = 512,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Train several configurations for the same useful FLOPs, and compare their held-out bits per byte."""
    from pretrain.bench.equal_compute import print_equal_compute

    files = [Path(name) for name in configs if "=" not in name]
    if not files:
        raise InputError("no configuration is named; give one or more YAML files of runs")
    print_equal_compute(files, [text for text in configs if "=" in text], flops, directory, samples, as_json)
