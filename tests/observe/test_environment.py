"""The description of the environment: complete, ready for JSON, and cheap."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from pretrain.observe.environment import PROJECT_ROOT, describe_environment, package_name, required_packages


def test_it_names_versions_command_and_machine() -> None:
    described = json.loads(json.dumps(describe_environment()))
    assert described["python"] == platform.python_version()
    assert described["packages"]["torch"] == version("torch")
    assert described["packages"]["megatron-core"] == version("megatron-core")
    assert described["cpu_cores"] >= 1
    assert described["command"] == sys.orig_argv


def test_nothing_heavy_is_imported() -> None:
    program = (
        "import sys; from pretrain.observe.environment import describe_environment\n"
        "found = describe_environment(); assert found['cuda_devices'] is None, found\n"
        "heavy = {'torch', 'numpy', 'rich', 'pydantic', 'yaml', 'packaging'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=PROJECT_ROOT)


def test_the_commit_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    assert describe_environment()["git"] is None
    (tmp_path / "file").write_text("one")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "file"], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", *command], check=True)
    state = describe_environment()["git"]
    assert len(state["commit"]) == 40 and state["uncommitted_changes"] is False
    (tmp_path / "file").write_text("two")
    assert describe_environment()["git"] == {"commit": state["commit"], "uncommitted_changes": True}


def test_requirements_are_those_of_the_project() -> None:
    names = [package_name(text) for text in required_packages()]
    assert "torch" in names and "pytest" not in names
    with pytest.raises(ValueError, match="does not start with"):
        package_name(">=3")
