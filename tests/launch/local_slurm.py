"""A SLURM of two virtual nodes on this machine, for tests: its daemons, and jobs to wait for."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

CONFIGURATION = """
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SlurmctldPort={port}
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmdSpoolDir={root}/spool-%n
StateSaveLocation={root}/state
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2,batch_sched_delay=0
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SlurmctldTimeout=30
SlurmdTimeout=60
KillWait=10
JobRequeue=1
MinJobAge=600
NodeName=n[0-1] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{second}] CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=n[0-1] Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")


def install() -> None:
    """Installs SLURM where it is missing and this process may; skips the test where not."""
    if os.geteuid() != 0:
        pytest.skip("SLURM's daemons are started by root alone")
    if all(map(shutil.which, PROGRAMS)):
        return
    if shutil.which("apt-get") is None:
        pytest.skip("SLURM is not installed, and there is no apt-get to install it")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    command = ["apt-get", "install", "-y", "--no-install-recommends", "slurm-wlm", "munge"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"SLURM is not installed, and apt-get could not install it: {done.stderr[-300:]}")


class LocalSlurm:
    """The daemons, from start to stop."""

    def __init__(self, root: Path):
        self.root, self.daemons = root, []
        for name in ("state", "spool-n0", "spool-n1", "munge"):
            (root / name).mkdir()
        ports = _free_ports(3)
        text = CONFIGURATION.format(
            host=socket.gethostname().split(".")[0], root=root, port=ports[0], first=ports[1], second=ports[1] + 1
        )
        (root / "slurm.conf").write_text(text)
        self.environment = os.environ | {"SLURM_CONF": str(root / "slurm.conf")}
        try:
            self._start_munge()
            self._start("slurmctld", "-D", "-c")
            for node in ("n0", "n1"):
                self._start("slurmd", "-D", "-N", node)
            self.wait(lambda: self.call("sinfo", "-h", "-o", "%T %D").strip() == "idle 2", 60, "both nodes to be idle")
        except BaseException:
            self.stop()
            raise

    def _start_munge(self) -> None:
        munge = self.root / "munge"
        (munge / "key").write_bytes(os.urandom(1024))
        (munge / "key").chmod(0o600)
        # The daemon refuses directories that others may write to, and so do the clients.
        munge.chmod(0o755)
        files = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed", "key-file": "key"}
        options = [f"--{option}={munge / name}" for option, name in files.items()]
        self._start("munged", "--foreground", "--force", *options)
        self.wait((munge / "socket").exists, 20, "munge's socket")

    def _start(self, *command: str) -> None:
        log = open(self.root / f"{Path(command[0]).name}-{len(self.daemons)}.out", "w")
        self.daemons.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=subprocess.STDOUT))

    def call(self, *command: str) -> str:
        """Output of one of SLURM's commands; empty where it fails."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        return done.stdout if done.returncode == 0 else ""

    def wait(self, holds: Callable[[], bool], seconds: float, what: str) -> None:
        """Until something holds."""
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, f"waited {seconds:.0f} seconds for {what}"
            time.sleep(0.5)

    def state(self, job: str) -> str:
        """R, PD, CG and so on; empty once it is over."""
        return self.call("squeue", "-h", "-j", job, "-o", "%t").strip()

    def stop(self) -> None:
        """Ends jobs and daemons."""
        self.call("scancel", "--user=root")
        with suppress(AssertionError):
            self.wait(lambda: not self.call("squeue", "-h").strip(), 30, "jobs to end")
        for daemon in reversed(self.daemons):
            daemon.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()


def _free_ports(count: int) -> list[int]:
    """Of which the next one is free too."""
    found: list[int] = []
    while len(found) < count:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            with suppress(OSError):
                other.bind(("127.0.0.1", port + 1))
                found.append(port)
    return found
