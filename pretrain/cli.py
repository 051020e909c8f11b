"""The command line: commands, their options and exit codes, nothing else.

Heavy imports stay inside the commands, so that ``--help``, ``plan`` and ``doctor`` start at once and need no torch.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from data.errors import DataError
from pretrain import cli_data, cli_distill, cli_evaluate, cli_launch, cli_observe, cli_tokenizer
from pretrain.cli_arguments import RunOrCheckpoint
from pretrain.errors import (
    EXIT_BAD_INPUT,
    EXIT_DONE,
    EXIT_FAILURE,
    EXIT_STOPPED_BY_SIGNAL,
    CheckError,
    InputError,
    TrainingError,
)

EXIT_CODES = """

Exit codes: 0 done; 2 bad input, said in one sentence; 3 stopped by a signal, the state saved; 4 no
progress for train.hang_seconds; 1 anything else.
"""

app = typer.Typer(
    name="pretrain",
    help="Pretrain large recurrent language models." + EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
checkpoint_app = typer.Typer(help="Look at checkpoints.", no_args_is_help=True)
bench_app = typer.Typer(help="Measure speed, with a peer beside us in the same run.", no_args_is_help=True)
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(bench_app, name="bench")
app.add_typer(cli_data.app, name="data")
app.add_typer(cli_tokenizer.app, name="tokenizer")
app.command("launch")(cli_launch.launch)
app.command("rank-layers")(cli_distill.rank_layers)
app.command("replace-layers")(cli_distill.replace_layers)
app.command("evaluate")(cli_evaluate.evaluate)
bench_app.command("recall")(cli_evaluate.bench_recall)
app.command("report")(cli_observe.report)
app.command("profile")(cli_observe.profile)

ConfigFile = Annotated[Path, typer.Argument(help="YAML file of the run", metavar="CONFIG")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="dotted overrides, for instance train.steps=100", metavar="[KEY=VALUE]...")
]


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[
        str, typer.Option(help="auto: the newest complete checkpoint, if any; never: start anew; or a path")
    ] = "auto",
) -> None:
    """Train. Under torchrun: torchrun --nproc-per-node N -m pretrain train CONFIG."""
    from pretrain.config import load_config
    from pretrain.observe.ending import errors_said, job_is_told, say_ending

    with errors_said():
        loaded = load_config(config, overrides or ())
        from pretrain.config.layout import check_world_size

        problem = check_world_size(loaded, int(os.environ.get("WORLD_SIZE", "1")))
        if problem:
            raise InputError(f"{config}: {problem}")
        from pretrain.train import train as run_training

        outcome = run_training(loaded, resume, process_ends=True)
    how = "stopped" if outcome.stopped_by_signal else "done"
    say_ending(how, f"step {outcome.step} of {loaded.train.steps}")
    # Launchers take any other code for a crash, and kill what has still to end on other nodes.
    stopped = outcome.stopped_by_signal and not job_is_told()
    raise typer.Exit(EXIT_STOPPED_BY_SIGNAL if stopped else EXIT_DONE)


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(help="processes; by default what the layout needs")] = None,
    gpu: Annotated[
        str | None, typer.Option(help="kind of GPU, to say whether it fits and how fast: h100, h200, a100, mi300x, ...")
    ] = None,
    mfu: Annotated[
        float, typer.Option(min=0.001, max=1, help="share of the peak rate: of useful work, and of products in a step")
    ] = 0.4,
    search: Annotated[
        bool, typer.Option("--search", help="try every layout of --gpus, and rank those that fit")
    ] = False,
    write: Annotated[Path | None, typer.Option(help="new YAML file with the best layout, for base")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Parameters, FLOPs, bytes and time of a run, or of every layout it could have; needs no GPU and no torch."""
    from pretrain.plan.command import PlanOptions, run_plan

    run_plan(config, overrides or (), PlanOptions(gpus, gpu, mfu, as_json, search, write))


@app.command()
def export(
    source: RunOrCheckpoint,
    output: Annotated[Path, typer.Argument(help="new directory", metavar="OUT")],
    max_shard_size: Annotated[
        str, typer.Option(help="largest weight file, as 500MB, 5GB or 2GiB; also about what is held in memory")
    ] = "5GB",
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16, of the weights; by default the run's train.precision")
    ] = None,
    check: Annotated[bool, typer.Option(help="load both models whole, 8 bytes a parameter, and compare logits")] = True,
    tolerance: Annotated[float, typer.Option(min=0, help="largest difference of a float32 logit that passes")] = 1e-4,
) -> None:
    """Write a model that transformers loads; it is loaded again and its logits compared before this says done.

    With it go its tokenizer, a model card written from the run, and code of its own where no class of transformers
    holds it. bfloat16 weights are compared twice: computing in float32 with ours rounded likewise, and in bfloat16,
    where a tenth of the logits' root mean square passes.
    """
    from pretrain.convert import export_model

    report = export_model(source, output, max_shard_size=max_shard_size, dtype=dtype, check=check, tolerance=tolerance)
    typer.echo(str(report))


@app.command("import")
def import_(
    directory: Annotated[
        Path, typer.Argument(help="config.json and safetensors files of a native class", metavar="HF_DIR")
    ],
    output: Annotated[Path, typer.Argument(help="new directory", metavar="OUT")],
    base: Annotated[
        Path | None,
        typer.Option("--config", help="YAML of all but the model; without it data and train are chosen afterwards"),
    ] = None,
    check: Annotated[bool, typer.Option(help="load both models whole, 8 bytes a parameter, and compare logits")] = True,
    tolerance: Annotated[float, typer.Option(min=0, help="largest difference of a float32 logit that passes")] = 1e-4,
) -> None:
    """Make a checkpoint of a transformers model, to go on with by pretrain train OUT/config.yaml --resume OUT.

    xLSTMForCausalLM, Mamba2ForCausalLM, NemotronHForCausalLM, BambaForCausalLM, GraniteMoeHybridForCausalLM,
    LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM; from safetensors alone, and nothing of the
    directory is executed. What config.json says and ours cannot express is refused by name.
    """
    from pretrain.convert import import_model

    typer.echo(str(import_model(directory, output, base=base, check=check, tolerance=tolerance)))


@app.command()
def generate(
    source: RunOrCheckpoint,
    prompt: Annotated[list[str] | None, typer.Option(help="text to go on from; may be repeated")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 200,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="draw from the k likeliest tokens; 0: all")] = 0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="draw from the likeliest tokens of this mass")] = 0.95,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    show_chunks: Annotated[
        bool,
        typer.Option(
            "--show-chunks", help="of a hierarchy: | where a chunk or word begins, || where one of stage 1 does"
        ),
    ] = False,
) -> None:
    """Sample text from a run or checkpoint."""
    from pretrain.generate import generate_text

    prompts = prompt or [""]
    texts = generate_text(source, prompts, max_new_tokens, temperature, top_k, top_p, seed, show_chunks=show_chunks)
    for given, text in zip(prompts, texts, strict=True):
        typer.echo(f"{'' if show_chunks else given}{text}\n{'-' * 40}")


@app.command()
def doctor() -> None:
    """Look at the environment: versions, clashes, what is missing."""
    from pretrain.doctor import examine, print_report

    raise typer.Exit(print_report(examine()))


@app.command()
def models() -> None:
    """List the registered mixers and hierarchies."""
    from pretrain.models.registry import channel_mixers, hierarchies, sequence_mixers

    for family in (*sequence_mixers().values(), *channel_mixers().values(), *hierarchies().values()):
        summary = (family.config.__doc__ or "").strip().splitlines()[0]
        typer.echo(f"{family.kind:9} {family.name:12} {summary}")


@checkpoint_app.command("list")
def checkpoint_list(run: Annotated[Path, typer.Argument(help="run directory", metavar="RUN")]) -> None:
    """List a run's checkpoints, broken ones too."""
    from pretrain.checkpoint.commands import describe_all

    for found in describe_all(run):
        typer.echo(json.dumps(found))


@checkpoint_app.command("inspect")
def checkpoint_inspect(source: RunOrCheckpoint) -> None:
    """Say what a checkpoint holds."""
    from pretrain.checkpoint.commands import describe

    typer.echo(json.dumps(describe(source), indent=2))


@checkpoint_app.command("verify")
def checkpoint_verify(source: RunOrCheckpoint) -> None:
    """Compare every file of a checkpoint with its checksum."""
    from pretrain.checkpoint.commands import verify

    typer.echo(json.dumps(verify(source), indent=2))


@bench_app.command("train")
def bench_train(
    rounds: Annotated[int, typer.Option(min=1, help="interleaved rounds; the median is printed")] = 7,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, every round's figures")] = False,
) -> None:
    """Tokens/s of forward and backward beside the xlstm package and the machine's own matrix products."""
    from pretrain.bench.train import print_bench_train

    print_bench_train(rounds, as_json)


@bench_app.command("kernels")
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


@bench_app.command("data")
def bench_data(
    tokens: Annotated[int, typer.Option(min=1_000_000, help="of the random corpus that is read")] = 100_000_000,
    rounds: Annotated[int, typer.Option(min=1, help="interleaved rounds; the median is printed")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, every round's figures")] = False,
) -> None:
    """Tokens/s of our batches beside Megatron's, datasets' and others', start-up, and tokenizing."""
    from pretrain.bench.data import print_bench_data

    print_bench_data(tokens, rounds, as_json)


@bench_app.command("checkpoint")
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


@bench_app.command("context")
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


@bench_app.command("equal-compute")
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


def _say(text: str) -> None:
    """An error, once however many processes meet it."""
    if os.environ.get("RANK", "0") == "0":
        typer.echo(text, err=True)


def main() -> None:
    """Runs a command and turns what it raises into a sentence and an exit code."""
    # Megatron-core warns, each time it is imported, of optional packages that nothing here needs.
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    # And torch of the names by which Megatron-core and DeepSpeed call its collectives.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    try:
        app()
    except (InputError, DataError) as error:
        _say(f"error: {error}")
        sys.exit(EXIT_BAD_INPUT)
    except (CheckError, TrainingError) as error:
        _say(f"error: {error}")
        sys.exit(EXIT_FAILURE)
