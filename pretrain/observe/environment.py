"""What a run was started with: versions, machine, commit, command. Imports neither torch nor any package."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

DISTRIBUTION = "recurrent-pretrain"
PROJECT_ROOT = Path(__file__).resolve().parents[2]

_GIT_TIMEOUT_SECONDS = 20


def required_packages() -> list[str]:
    """The requirements of this project as written (``numpy>=2.0,<2.4``), without the optional groups.

    From ``pyproject.toml`` in a source tree, else from the metadata of the installed distribution; empty where
    there is neither.
    """
    # An installed copy has no pyproject.toml beside it, or another project's.
    with contextlib.suppress(OSError, KeyError, ValueError):
        project = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text())["project"]
        if project["name"] == DISTRIBUTION:
            return list(project["dependencies"])
    try:
        requirements = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [text for text in requirements if "extra ==" not in text]


def package_name(requirement: str) -> str:
    """The name in a requirement: ``numpy`` of ``numpy>=2.0,<2.4``."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement.strip())
    if match is None:
        raise ValueError(f"'{requirement}' does not start with the name of a package")
    return match.group()


def installed_version(package: str) -> str | None:
    """The installed version of a distribution, without importing it; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def available_cpu_cores() -> int:
    """CPU cores that this process may use (its affinity, not the machine's total)."""
    return len(os.sched_getaffinity(0))


def describe_environment() -> dict[str, Any]:
    """What is needed to know later on what a run ran, as a JSON-ready mapping.

    CUDA devices are listed only where torch is imported already; importing it here would cost seconds.
    """
    packages = {package_name(text): None for text in required_packages()}
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": list(sys.orig_argv),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "cpu_cores": available_cpu_cores(),
        "cuda_devices": _cuda_devices(),
        "packages": {name: installed_version(name) for name in packages},
        "git": _git_state(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }


def _cuda_devices() -> list[str] | None:
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _git_state() -> dict[str, Any] | None:
    """Commit of the working directory and whether tracked files differ from it; None outside a repository."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "uncommitted_changes": None if changes is None else bool(changes)}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, timeout=_GIT_TIMEOUT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
