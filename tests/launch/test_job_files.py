"""What a job's files say, and the commands for machines without SLURM."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.testing

from launch import write_job
from launch.machines import local_command, node_commands
from pretrain.cli import app
from pretrain.config import load_config
from pretrain.errors import InputError
from tests.configurations import tiny_config


def directives(script: Path) -> list[str]:
    lines = script.read_text().splitlines()
    return [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]


def launch(*arguments: str) -> typer.testing.Result:
    return typer.testing.CliRunner().invoke(app, ["launch", *arguments])


def is_shell(file: Path) -> bool:
    return subprocess.run(["bash", "-n", str(file)]).returncode == 0


def test_what_is_asked_for(tmp_path: Path) -> None:
    run = tmp_path / "a run"
    settings = {
        "nodes": 4,
        "gpus_per_node": 8,
        "request_gpus": "gres",
        "account": "lab",
        "partition": "big",
        "qos": "high",
        "constraint": "a100|h100",
        "time": "2-00:00:00",
        "cpus_per_task": 6,
        "signal_seconds": 120,
        "options": ["--exclusive", "--mem=0"],
    }
    files = write_job(tiny_config(str(run), launch=settings))
    assert directives(files.script) == [
        "--job-name='a run'",
        "--nodes=4",
        "--ntasks-per-node=1",
        "--account=lab",
        "--partition=big",
        "--qos=high",
        "--constraint='a100|h100'",
        "--time=2-00:00:00",
        f"--output='{run}/launch/job-%j.log'",
        "--open-mode=append",
        "--signal=B:USR1@120",
        "--cpus-per-task=48",
        "--gres=gpu:8",
        "--requeue",
        "--exclusive",
        "--mem=0",
    ]
    assert is_shell(files.script) and is_shell(files.node_script)
    assert load_config(files.config).launch.account == "lab"


def test_a_process_for_each_task(tmp_path: Path) -> None:
    settings = {"gpus_per_node": 4, "starter": "srun", "cpus_per_task": 2, "request_gpus": "none", "again": "never"}
    files = write_job(tiny_config(str(tmp_path / "run"), launch=settings))
    asked = directives(files.script)
    assert {"--ntasks-per-node=4", "--cpus-per-task=2", "--no-requeue"} <= set(asked)
    assert not any("gpu" in line for line in asked)
    assert "srun --kill-on-bad-exit=1 --ntasks-per-node=4 --cpus-per-task=2 bash" in files.script.read_text()
    node = files.node_script.read_text()
    assert "RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=4" in node
    assert "--processes 1 --per-node 4" in node and "torch.distributed.run" not in node
    assert is_shell(files.script) and is_shell(files.node_script)


def test_containers_modules_and_networks(tmp_path: Path) -> None:
    container = {"image": "registry#image:1", "mounts": ["/data:/data:ro"], "options": ["--container-writable"]}
    settings = {
        "container": container,
        "python": "/opt/python",
        "modules": ["cuda/12.9"],
        "network_interface": "ib0",
        "environment": {"NCCL_DEBUG": "INFO"},
    }
    files = write_job(tiny_config(str(tmp_path / "run"), launch=settings))
    script, node, here = files.script.read_text(), files.node_script.read_text(), Path.cwd()
    options = f"'--container-image=registry#image:1' --container-mounts={here}:{here},/data:/data:ro"
    assert f"{options} --container-workdir={here} --container-writable bash" in script
    # Beside the container the interpreter is the one that wrote the job.
    assert f"attempts() {{ {sys.executable} " in script and "/opt/python -m torch.distributed.run" in node
    assert "module load cuda/12.9" in script and "module load cuda/12.9" in node
    for name, value in {"NCCL_SOCKET_IFNAME": "ib0", "GLOO_SOCKET_IFNAME": "ib0", "NCCL_DEBUG": "INFO"}.items():
        assert f"export {name}={value}" in node


def test_a_directory_with_a_job_alone_is_that_of_a_new_run(tmp_path: Path) -> None:
    from pretrain.observe.run_directory import RunDirectory

    config = tiny_config(str(tmp_path / "run"))
    write_job(config)
    directory = RunDirectory(tmp_path / "run")
    directory.prepare(config, "auto")
    directory.release()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"time": 45000}, "write it as '12:00:00'"),
        ({"time": "a day"}, "expected what sbatch takes"),
        ({"options": ["exclusive"]}, "is no option"),
        ({"account": "a\nb"}, "launch.account"),
        ({"environment": {"A B": "c"}}, "no name of an environment variable"),
        ({"nodse": 1}, "did you mean 'nodes'"),
    ],
)
def test_bad_settings_are_refused(section: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match="launch") as caught:
        tiny_config(launch=section)
    assert message in str(caught.value)


def test_the_command_prints_the_script_and_where_the_run_is(tmp_path: Path) -> None:
    arguments = ["configs/quickstart.yaml", f"run.directory={tmp_path}/run", "--nodes", "2", "--gpus-per-node", "1"]
    done = launch(*arguments, "--time", "12:00:00", "--partition", "main")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "run/launch/job.sbatch").read_text() in done.output
    assert f"the run is kept in {tmp_path}/run" in done.output and "--time=12:00:00" in done.output


def test_a_directory_of_another_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    done = launch("configs/quickstart.yaml", f"run.directory={tmp_path}", "--gpus-per-node", "1")
    assert "is not the directory of a run" in str(done.exception)
    assert not (tmp_path / "launch").exists()


def test_a_run_begins_with_a_checkpoint_and_goes_on_with_its_own(tmp_path: Path) -> None:
    arguments = ["configs/quickstart.yaml", f"run.directory={tmp_path}/run", "--gpus-per-node", "1"]
    assert launch(*arguments, "--resume", "an import").exit_code == 0
    node = (tmp_path / "run/launch/node.sh").read_text()
    assert f"[ -e {tmp_path}/run/environment.json ] || resume='an import'" in node and '--resume "$resume"' in node
    printed = launch(*arguments, "--resume", "an import", "--first-node", "h").output
    assert "--resume 'an import'" in printed


def test_processes_that_do_not_fit_the_layout_are_refused(tmp_path: Path) -> None:
    done = launch("configs/quickstart.yaml", f"run.directory={tmp_path}/run", "--nodes", "3", "--gpus-per-node", "1")
    assert isinstance(done.exception, InputError) and "with launch.nodes=3" in str(done.exception)
    assert not (tmp_path / "run").exists()


def test_sbatch_that_is_not_there_or_refuses_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["configs/quickstart.yaml", f"run.directory={tmp_path}/run", "--gpus-per-node", "1", "--submit"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "there is no sbatch here" in str(launch(*arguments).exception)
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 'invalid account' >&2; exit 1\n")
    sbatch.chmod(0o755)
    assert "sbatch refused" in str(launch(*arguments).exception)
    sbatch.write_text("#!/bin/sh\necho Submitted batch job 17 $1\n")
    assert f"Submitted batch job 17 {tmp_path}/run/launch/job.sbatch" in launch(*arguments).output


def test_commands_for_machines_without_slurm(tmp_path: Path) -> None:
    done = launch(
        "configs/quickstart.yaml",
        "train.micro_batch_size=2",
        "--nodes",
        "2",
        "--gpus-per-node",
        "2",
        "--first-node",
        "h",
    )
    commands = [shlex.split(line) for line in done.output.splitlines() if not line.startswith("#")]
    expected = node_commands(
        sys.executable,
        2,
        2,
        "h",
        29500,
        ["-m", "pretrain", "train", "configs/quickstart.yaml", "train.micro_batch_size=2"],
    )
    assert commands == expected
    assert [command[command.index("--node-rank") + 1] for command in commands] == ["0", "1"]
    assert "--standalone" in local_command(sys.executable, 2, ["-m", "pretrain"])
    two_ways = launch("configs/quickstart.yaml", "--local", "--first-node", "h")
    assert "give one" in str(two_ways.exception)


def test_launching_needs_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['pretrain', 'launch', 'configs/quickstart.yaml', "
        f"'run.directory={tmp_path}/run', '--gpus-per-node', '1']; from pretrain.cli import main; main()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)
    assert (tmp_path / "run/launch/job.sbatch").exists()
