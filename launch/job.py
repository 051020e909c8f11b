"""The files of a SLURM job, from readable templates."""

from __future__ import annotations

import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from launch import attempts
from launch.machines import SHUTDOWN_SECONDS
from pretrain.config import Config, dump_config
from pretrain.config.launch import LaunchConfig

TEMPLATES = Path(__file__).with_name("templates")
_PLACE = re.compile(r"@\{(\w+)\}")


@dataclass(frozen=True)
class JobFiles:
    """Where they are.

    Attributes:
        directory: ``RUN/launch``.
        script: what sbatch takes.
        node_script: what it runs on the nodes.
        config: the configuration, resolved.
    """

    directory: Path

    @property
    def script(self) -> Path:
        return self.directory / "job.sbatch"

    @property
    def node_script(self) -> Path:
        return self.directory / "node.sh"

    @property
    def config(self) -> Path:
        return self.directory / "config.yaml"


def write_job(config: Config, resume: str = "auto") -> JobFiles:
    """Writes the job of a configuration with a ``launch`` section into its run directory, each file at once.

    Args:
        resume: ``auto``, or the checkpoint that the run begins with.

    Raises:
        OSError: they cannot be written.
    """
    launch, run = config.launch or LaunchConfig(), Path(config.run.directory).absolute()
    files = JobFiles(run / "launch")
    files.directory.mkdir(parents=True, exist_ok=True)
    values = _values(launch, run, files) | {"resume": shlex.quote(resume)}
    _write(files.config, dump_config(config))
    for file, template in ((files.node_script, "node.sh"), (files.script, "slurm.sbatch")):
        _write(file, fill(template, values))
    return files


def fill(template: str, values: dict[str, str]) -> str:
    """A template with its ``@{places}`` filled; lines that come to nothing are left out."""
    lines = []
    for line in (TEMPLATES / template).read_text().splitlines():
        filled = _PLACE.sub(lambda place: values[place[1]], line)
        if filled.strip() or not line.strip():
            lines.append(filled)
    return "\n".join(lines) + "\n"


def _write(file: Path, text: str) -> None:
    # A job that is running goes on reading the file that it has opened.
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, file)


def _values(launch: LaunchConfig, run: Path, files: JobFiles) -> dict[str, str]:
    quote = shlex.quote
    python = quote(launch.python or sys.executable)
    # On the nodes it may be that of a container; beside them it is the one that launches.
    outside = quote(sys.executable)
    per_task = launch.gpus_per_node if launch.starter == "torchrun" else 1
    steps = ["step on_nodes check"] * launch.check_nodes + ["step on_nodes train"]
    return {
        "directives": _directives(launch, run, files),
        "run": quote(str(run)),
        "script": quote(str(files.script)),
        "working_directory": quote(str(Path.cwd())),
        "launch_directory": quote(str(files.directory)),
        "modules": "\n".join(f"module load {quote(name)}" for name in launch.modules),
        "environment": "\n".join(f"export {name}={quote(text)}" for name, text in _environment(launch).items()),
        "setup": "\n".join(launch.setup),
        "python": python,
        "outside_python": outside,
        "attempts": quote(str(Path(attempts.__file__).absolute())),
        "srun_options": " ".join(_srun_options(launch)),
        "steps": " && ".join(steps),
        "first_step": "check" if launch.check_nodes else "train",
        "check_seconds": f"{launch.check_seconds:g}",
        "processes_per_task": f"{per_task} --per-node {launch.gpus_per_node}",
        "start": _start(launch, python),
        "kernel_cache": quote(launch.kernel_cache),
        "max_failures": str(launch.max_failures),
        "wait_seconds": f"{launch.wait_seconds:g}",
        "again": _again(launch, files),
    }


def _directives(launch: LaunchConfig, run: Path, files: JobFiles) -> str:
    by_torchrun = launch.starter == "torchrun"
    tasks = 1 if by_torchrun else launch.gpus_per_node
    options = {
        "job-name": launch.job_name or run.name,
        "nodes": launch.nodes,
        "ntasks-per-node": tasks,
        "account": launch.account,
        "partition": launch.partition,
        "qos": launch.qos,
        "constraint": launch.constraint,
        "time": launch.time,
        "output": f"{files.directory}/job-%j.log",
        # A requeued job goes on in the log of its first start.
        "open-mode": "append",
        "signal": f"B:USR1@{launch.signal_seconds}",
    }
    if launch.cpus_per_task is not None:
        options["cpus-per-task"] = launch.cpus_per_task * (launch.gpus_per_node if by_torchrun else 1)
    if launch.request_gpus == "gpus-per-node":
        options["gpus-per-node"] = launch.gpus_per_node
    elif launch.request_gpus == "gres":
        options["gres"] = f"gpu:{launch.gpus_per_node}"
    lines = [f"--{name}={shlex.quote(str(value))}" for name, value in options.items() if value is not None]
    lines.append("--requeue" if launch.again == "requeue" else "--no-requeue")
    return "\n".join(f"#SBATCH {line}" for line in [*lines, *launch.options])


def _environment(launch: LaunchConfig) -> dict[str, str]:
    variables = {"PYTHONUNBUFFERED": "1"}
    if launch.network_interface is not None:
        variables |= dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), launch.network_interface)
    return variables | launch.environment


def _srun_options(launch: LaunchConfig) -> list[str]:
    options = [f"--ntasks-per-node={1 if launch.starter == 'torchrun' else launch.gpus_per_node}"]
    if launch.cpus_per_task is not None:
        # Since 22.05 srun does not take it from sbatch.
        per_task = launch.cpus_per_task * (launch.gpus_per_node if launch.starter == "torchrun" else 1)
        options.append(f"--cpus-per-task={per_task}")
    if launch.container is not None:
        container, here = launch.container, str(Path.cwd())
        mounts = [f"{here}:{here}", *container.mounts]
        options += [f"--container-image={container.image}", f"--container-mounts={','.join(mounts)}"]
        options += [f"--container-workdir={here}", *container.options]
    return [shlex.quote(option) for option in options]


def _start(launch: LaunchConfig, python: str) -> str:
    if launch.starter == "srun":
        ranks = "RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID"
        return f"{ranks} LOCAL_WORLD_SIZE={launch.gpus_per_node} {python}"
    return (
        f'{python} -m torch.distributed.run --nnodes "$SLURM_JOB_NUM_NODES" --node-rank "$SLURM_NODEID" '
        f"--nproc-per-node {launch.gpus_per_node} "
        f'--master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" --shutdown-timeout {SHUTDOWN_SECONDS}'
    )


def _again(launch: LaunchConfig, files: JobFiles) -> str:
    script = shlex.quote(str(files.script))
    if launch.again == "requeue":
        return (
            'scontrol requeue "$SLURM_JOB_ID" || { echo "this cluster does not requeue: set launch.again=submit"; '
            "exit 1; }\nsleep 60  # until SLURM ends this shell"
        )
    if launch.again == "submit":
        return f"sbatch {script}"
    return f'echo "to go on: sbatch {script}"\nexit 3'
