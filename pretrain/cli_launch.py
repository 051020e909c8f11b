"""``pretrain launch``: runs on this machine, on several, or as a job of SLURM."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from pretrain.errors import InputError


def launch(
    config: Annotated[Path, typer.Argument(help="YAML file of the run", metavar="CONFIG")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="dotted overrides, for instance launch.time=1-00:00:00", metavar="[KEY=VALUE]..."),
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="launch.nodes")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="launch.gpus_per_node: processes on each")] = None,
    account: Annotated[str | None, typer.Option(help="launch.account")] = None,
    partition: Annotated[str | None, typer.Option(help="launch.partition")] = None,
    qos: Annotated[str | None, typer.Option(help="launch.qos")] = None,
    constraint: Annotated[str | None, typer.Option(help="launch.constraint")] = None,
    time: Annotated[str | None, typer.Option(help="launch.time: limit of one job, as in 1-00:00:00")] = None,
    resume: Annotated[
        str, typer.Option(help="auto, or a checkpoint to begin with, as of train; from then on the run's own")
    ] = "auto",
    submit: Annotated[bool, typer.Option("--submit", help="give the job to sbatch")] = False,
    local: Annotated[bool, typer.Option("--local", help="train on this machine now, by torchrun")] = False,
    first_node: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="without SLURM: print each node's command; the others reach the first so"),
    ] = None,
    port: Annotated[int, typer.Option(min=1024, max=65535, help="on the first node, with --first-node")] = 29500,
) -> None:
    """Write a SLURM job that trains until all steps are done: preempted, out of time or failed, it goes on by itself.

    Prints the script and where the run is kept; --submit starts it. Options stand for keys of the launch section, whose
    further keys say how GPUs are asked for, what is loaded, containers, and when to give up. Needs no torch.
    """
    if sum((submit, local, first_node is not None)) > 1:
        raise InputError("--submit, --local and --first-node are three ways to start: give one")
    options = {
        "nodes": nodes,
        "gpus_per_node": gpus_per_node,
        "account": account,
        "partition": partition,
        "qos": qos,
        "constraint": constraint,
        "time": time,
    }
    given = [f"launch.{key}={_as_yaml(value)}" for key, value in options.items() if value is not None]
    from pretrain.config import load_config
    from pretrain.config.launch import LaunchConfig

    loaded = load_config(config, [*(overrides or ()), *given])
    if loaded.launch is None:
        loaded = loaded.model_copy(update={"launch": LaunchConfig()})
    asked = loaded.launch
    if local and asked.nodes != 1:
        raise InputError(f"--local starts one machine, but launch.nodes={asked.nodes}; give --nodes 1 or --first-node")
    from pretrain.config.layout import check_world_size

    problem = check_world_size(loaded, asked.nodes * asked.gpus_per_node)
    if problem:
        raise InputError(f"{config}: with launch.nodes={asked.nodes} x gpus_per_node={asked.gpus_per_node}: {problem}")
    from launch import local_command, node_commands, write_job
    from pretrain.observe.run_directory import RunDirectory

    RunDirectory(loaded.run.directory).check(loaded)

    python = asked.python or sys.executable
    program = ["-m", "pretrain", "train", str(config), *(overrides or ())]
    program += [] if resume == "auto" else ["--resume", resume]
    if local:
        command = local_command(python, asked.gpus_per_node, program)
        typer.echo(shlex.join(command))
        sys.stdout.flush()
        os.execvp(command[0], command)
    if first_node is not None:
        for index, command in enumerate(
            node_commands(python, asked.nodes, asked.gpus_per_node, first_node, port, program)
        ):
            typer.echo(f"# node {index}\n{shlex.join(command)}")
        return
    try:
        files = write_job(loaded, resume)
    except OSError as error:
        raise InputError(f"run.directory {loaded.run.directory} cannot be written: {error.strerror or error}") from None
    typer.echo(files.script.read_text())
    typer.echo(f"# the run is kept in {files.directory.parent}, its log in {files.directory}/job-JOB.log")
    if submit:
        typer.echo(_submitted(files.script))
    else:
        typer.echo(f"# to start it: sbatch {shlex.quote(str(files.script))}, or this command with --submit")


def _as_yaml(value: str | int) -> str:
    """A value that YAML reads back as it is: a time without quotes would become a number."""
    return str(value) if isinstance(value, int) else "'" + value.replace("'", "''") + "'"


def _submitted(script: Path) -> str:
    if shutil.which("sbatch") is None:
        raise InputError(
            "there is no sbatch here: submit from a machine of the cluster, or use --local or --first-node"
        )
    done = subprocess.run(["sbatch", str(script)], capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"sbatch refused {script}: {' '.join(done.stderr.split()) or f'exit code {done.returncode}'}")
    return done.stdout.strip()
