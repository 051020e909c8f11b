"""An import that is killed leaves nothing that could be taken for one, and the next one clears away what it left."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint import shards, writer
from pretrain.checkpoint.commands import verify
from pretrain.convert import import_model
from pretrain.convert import importing as module
from pretrain.convert import output as output_module
from pretrain.errors import InputError
from tests.runs import environment, pretrain_command, started


class Killed(BaseException):
    """Nothing that anyone cleans up after."""


# Where an import can be cut short: what it is about to call, or has just called.
PHASES: dict[str, tuple[Any, str, bool]] = {
    "before the first shard": (shards, "save_file", False),
    "first shard written": (shards, "save_file", True),
    "before the manifest": (writer, "_publish", False),
    "checkpoint complete": (writer, "_publish", True),
    "before the configuration": (module, "write_durably", False),
    "before the rename": (output_module.os, "rename", False),
}


@pytest.mark.parametrize("phase", PHASES)
def test_killed_at_any_point_it_leaves_no_import_and_the_next_is_whole(
    phase: str, saved: Callable[[str], Path], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, after = PHASES[phase]
    original = getattr(owner, name)
    output = tmp_path / "imported"

    def cut(*arguments: Any, **options: Any) -> None:
        if phase == "before the rename" and arguments[1] != output:
            original(*arguments, **options)
            return
        if after:
            original(*arguments, **options)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, cut)
        # A killed process removes nothing.
        patch.setattr(output_module.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(Killed):
            import_model(saved("mamba2"), output, base=base, check=False)
    left = {entry.name for entry in tmp_path.iterdir()} - {"base.yaml"}
    assert left == {f".imported.unfinished-{output_module._host()}-{os.getpid()}"}
    import_model(saved("mamba2"), output, base=base, check=False)
    assert {entry.name for entry in tmp_path.iterdir()} == {"base.yaml", "imported"}
    assert verify(output)["step"] == 0


def test_a_half_import_under_the_right_name_is_refused(
    saved: Callable[[str], Path], base: Path, tmp_path: Path
) -> None:
    """As when someone renames what a killed import left: the checkpoint is judged by its manifest alone."""
    import_model(saved("mamba2"), tmp_path / "imported", base=base, check=False)
    (tmp_path / "imported" / "step-00000000" / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"manifest\.json is missing: the checkpoint is incomplete"):
        verify(tmp_path / "imported")


@pytest.mark.slow
def test_the_command_killed_at_different_moments(saved: Callable[[str], Path], base: Path, tmp_path: Path) -> None:
    command = pretrain_command("import", saved("mamba2"), tmp_path / "imported", "--config", base, "--no-check")
    killed = 0
    for moment in range(5):
        with started(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            # Writing begins with a directory beside the output; kill a little later each time.
            while process.poll() is None and not list(tmp_path.glob(f".imported.unfinished-*-{process.pid}")):
                time.sleep(0.001)
            time.sleep(0.004 * moment)
            process.send_signal(signal.SIGKILL)
            process.communicate()
        if process.returncode != -signal.SIGKILL or (tmp_path / "imported").exists():
            # It was too quick for this moment, and is whole.
            break
        killed += 1
    assert killed > 0
    if not (tmp_path / "imported").exists():
        assert subprocess.run(command, env=environment()).returncode == 0
    assert verify(tmp_path / "imported")["step"] == 0
    assert {entry.name for entry in tmp_path.iterdir()} == {"base.yaml", "imported"}
