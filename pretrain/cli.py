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
from pretrain import cli_bench, cli_data, cli_distill, cli_evaluate, cli_launch, cli_observe, cli_tokenizer
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
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(cli_bench.app, name="bench")
app.add_typer(cli_data.app, name="data")
app.add_typer(cli_tokenizer.app, name="tokenizer")

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


app.command("launch")(cli_launch.launch)
app.command("evaluate")(cli_evaluate.evaluate)
cli_bench.app.command("recall")(cli_evaluate.bench_recall)
app.command("report")(cli_observe.report)
app.command("profile")(cli_observe.profile)
app.command("rank-layers")(cli_distill.rank_layers)
app.command("replace-layers")(cli_distill.replace_layers)


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
