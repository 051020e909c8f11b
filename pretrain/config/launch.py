"""How a run is started on a cluster. Imports no torch."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator

from pretrain.models.mixer_config import StrictModel

_TIME = re.compile(r"(\d+-)?\d+(:\d{1,2}){0,2}")
# A value stands on a line of its own in the script.
_ONE_LINE = r"^[^\n\r]*$"


class ContainerConfig(StrictModel):
    """A container that every process runs in, by pyxis and enroot."""

    image: str = Field(min_length=1, pattern=_ONE_LINE, description="for instance a .sqsh file, or REGISTRY#IMAGE:TAG")
    mounts: list[str] = Field(
        default_factory=list, description="HOST:CONTAINER[:ro]; the working directory is among them"
    )
    options: list[str] = Field(
        default_factory=list, description="more of srun's options, for instance --container-writable"
    )


class LaunchConfig(StrictModel):
    """A SLURM job: what it asks for, and what it does when it ends before the run does."""

    nodes: int = Field(1, ge=1)
    gpus_per_node: int = Field(8, ge=1, description="processes on each node, one for each of its GPUs")
    request_gpus: Literal["gpus-per-node", "gres", "none"] = Field(
        "gpus-per-node", description="how the script asks for GPUs: --gpus-per-node=N, --gres=gpu:N, or not at all"
    )
    account: str | None = Field(None, min_length=1, pattern=_ONE_LINE)
    partition: str | None = Field(None, min_length=1, pattern=_ONE_LINE)
    qos: str | None = Field(None, min_length=1, pattern=_ONE_LINE)
    constraint: str | None = Field(None, min_length=1, pattern=_ONE_LINE)
    time: str | None = Field(None, description="limit of one job, as in '1-00:00:00'; null: the partition's")
    job_name: str | None = Field(None, min_length=1, pattern=_ONE_LINE, description="null: that of the run directory")
    cpus_per_task: int | None = Field(None, ge=1, description="of each of srun's tasks; null: the cluster's default")
    options: list[str] = Field(default_factory=list, description="more of sbatch's options, for instance --exclusive")
    modules: list[str] = Field(default_factory=list, description="loaded with 'module load' before anything else")
    setup: list[str] = Field(
        default_factory=list, description="lines of shell that each node runs before the processes"
    )
    environment: dict[str, str] = Field(default_factory=dict, description="variables of every process")
    container: ContainerConfig | None = None
    python: str | None = Field(
        None, min_length=1, pattern=_ONE_LINE, description="interpreter on the nodes; null: the one that launches"
    )
    starter: Literal["torchrun", "srun"] = Field(
        "torchrun", description="torchrun: one on each node, which starts its processes; srun: one task a process"
    )
    network_interface: str | None = Field(
        None, pattern=r"^[A-Za-z0-9_.,^=:-]+$", description="of NCCL and gloo, for instance ib0; null: they choose"
    )
    kernel_cache: str = Field(
        "/tmp", pattern=r"^/[^\n\r'\"]*$", description="directory on each node's own disk for compiled kernels"
    )
    check_nodes: bool = Field(True, description="before training, a product on every device and a sum over all of them")
    check_seconds: float = Field(600.0, gt=0, description="after which nodes that have not answered count as broken")
    signal_seconds: int = Field(
        300, ge=10, le=65535, description="before the time limit, when the run is told to save and end"
    )
    again: Literal["requeue", "submit", "never"] = Field(
        "requeue",
        description="how a run goes on that its job has left: requeue: the same job again; submit: a new job, where "
        "jobs are not requeued; never",
    )
    max_failures: int = Field(
        3,
        ge=0,
        description="failed jobs in a row, none of which saved a new checkpoint, after which it is not tried again",
    )
    wait_seconds: float = Field(
        30.0, ge=0, description="after a first failure before the next try; doubled with each further one, up to 600"
    )

    @field_validator("time", mode="before")
    @classmethod
    def _time_is_text(cls, value: Any) -> Any:
        if isinstance(value, int):
            raise ValueError("without quotes YAML reads hours:minutes:seconds as a number; write it as '12:00:00'")
        if isinstance(value, str) and not _TIME.fullmatch(value):
            raise ValueError("expected what sbatch takes: minutes, hours:minutes:seconds or days-hours:minutes:seconds")
        return value

    @field_validator("options")
    @classmethod
    def _options_are_options(cls, values: list[str]) -> list[str]:
        for value in values:
            if not re.fullmatch(r"-[^\n\r]+", value):
                raise ValueError(f"{value!r} is no option; write each as sbatch takes it, for instance --exclusive")
        return values

    @field_validator("environment")
    @classmethod
    def _variables_have_names(cls, values: dict[str, str]) -> dict[str, str]:
        for name in values:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"{name!r} is no name of an environment variable")
        return values
