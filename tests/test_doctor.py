"""The environment check: what it finds, what it says to do, and that it works where things are missing."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from pretrain import doctor
from pretrain.doctor import Finding, examine, print_report
from pretrain.errors import EXIT_BAD_INPUT, EXIT_DONE
from pretrain.observe.environment import PROJECT_ROOT


def install(directory: Path, name: str, top_level: str) -> None:
    """What an installer leaves: a package and the metadata that says which distribution it came with."""
    (directory / top_level).mkdir(parents=True)
    (directory / top_level / "__init__.py").write_text("")
    metadata = directory / f"{name}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (metadata / "top_level.txt").write_text(f"{top_level}\n")
    (metadata / "RECORD").write_text(f"{top_level}/__init__.py,,\n")


def by_name(findings: object) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``versions(numpy="2.4.0", wandb=None)``: other installed versions than there are."""

    def change(**changed: str | None) -> None:
        real = doctor.installed_version
        monkeypatch.setattr(doctor, "installed_version", lambda name: changed[name] if name in changed else real(name))

    return change


def test_this_environment_is_examined_whole() -> None:
    findings = by_name(examine())
    expected = {"Python", "packages", "name kernels", "name data", "triton", "torch", "CUDA", "gloo", "CPU cores"}
    assert expected <= set(findings)
    for finding in findings.values():
        assert finding.ok == (finding.level == "information") == (not finding.remedy), finding


def test_a_kernels_package_of_others_is_named_where_it_hides_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "other-kernels", "kernels")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "kernels"]:
        monkeypatch.delitem(sys.modules, name)
    found = by_name(doctor._top_level_names())
    assert found["name kernels"].level == "error"
    assert str(tmp_path / "kernels") in found["name kernels"].message
    assert "other-kernels installed" in found["name kernels"].message
    assert "pip uninstall other-kernels" in found["name kernels"].remedy
    assert str(PROJECT_ROOT) in found["name kernels"].remedy
    assert found["name data"].ok


def test_a_kernels_package_of_others_behind_ours_is_an_error_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "other-kernels", "kernels")
    monkeypatch.setattr(sys, "path", [str(PROJECT_ROOT), *sys.path, str(tmp_path)])
    importlib.invalidate_caches()
    found = by_name(doctor._top_level_names())["name kernels"]
    assert found.level == "error"
    assert "gives this project's package, but other-kernels installed one of the same name" in found.message
    assert found.remedy.startswith("pip uninstall other-kernels")


def test_missing_and_wrong_versions_are_errors_unless_one_feature_needs_them(
    versions: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = ["torch>=2.11", "numpy>=2.0,<2.4", "wandb>=0.20", "rich>=13", "absent>=1; extra == 'test'"]
    monkeypatch.setattr(doctor, "required_packages", lambda: wanted)
    versions(torch="2.12.0a0+cpu", numpy="2.4.1", wandb=None, rich=None)
    found = by_name(doctor._packages())
    assert found["numpy"].level == "error"
    assert found["numpy"].message == "2.4.1 does not satisfy <2.4,>=2.0"
    assert found["numpy"].remedy == "pip install 'numpy>=2.0,<2.4'"
    assert found["rich"].level == "error" and found["rich"].message == "is not installed"
    assert found["wandb"].level == "warning" and "only the section 'wandb'" in found["wandb"].message
    assert "torch" not in found and "absent" not in found
    assert "torch 2.12.0a0+cpu" in found["packages"].message


def test_unknown_requirements_are_said_to_be_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "required_packages", list)
    (found,) = doctor._packages()
    assert found.level == "warning" and "pip install -e ." in found.remedy


@pytest.mark.parametrize(
    ("triton", "numpy", "ok"),
    [
        ("3.6.0", "2.4.0", False),
        ("3.6.0", "2.3.5", True),
        ("3.9.0", "2.4.0", True),
        ("3.10.0", "2.10.1", True),
        ("3.6.0+git12", "3.0.0rc1", False),
        (None, "2.3.5", False),
    ],
)
def test_the_versions_of_triton_and_numpy_that_break_together(
    versions: Callable[..., None], triton: str | None, numpy: str, ok: bool
) -> None:
    versions(triton=triton, numpy=numpy)
    (found,) = doctor._triton()
    assert found.ok == ok
    if not ok:
        assert found.level == "warning" and "pip install" in found.remedy


def test_a_missing_torch_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    findings = examine()
    found = by_name(findings)["torch"]
    assert found.level == "error" and "cannot be imported" in found.message and "torch>=" in found.remedy
    assert "CPU cores" in by_name(findings), "the rest must still be examined"
    assert print_report(findings) == EXIT_BAD_INPUT


def test_a_torch_without_gloo_cannot_train(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.distributed, "is_gloo_available", lambda: False)
    found = by_name(doctor._torch())["gloo"]
    assert found.level == "error" and found.remedy


def test_an_old_python_and_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    assert by_name(doctor._python())["Python"].level == "error"
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2e9))
    disk = by_name(doctor._machine())["disk"]
    assert disk.level == "warning" and disk.message.startswith("2.0 GB free")


def test_the_exit_code_says_whether_training_can_work(capsys: pytest.CaptureFixture[str]) -> None:
    good = Finding("Python", True, "information", "3.11")
    warning = Finding("disk", False, "warning", "1 GB free [here]", "free some")
    error = Finding("torch", False, "error", "missing", "install it")
    assert print_report([good]) == EXIT_DONE
    assert capsys.readouterr().out.splitlines()[-1].strip() == "ready to train"
    assert print_report([good, warning]) == EXIT_DONE
    text = capsys.readouterr().out
    assert "disk: 1 GB free [here]" in text and "-> free some" in text and "1 warning(s)" in text
    assert print_report([good, warning, error]) == EXIT_BAD_INPUT
    assert "1 error(s), 1 warning(s)" in capsys.readouterr().out


def test_a_terminal_gets_colours(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert print_report([Finding("torch", False, "error", "missing [x]", "install it")]) == EXIT_BAD_INPUT
    text = capsys.readouterr().out
    assert "\x1b[1;31mERROR\x1b[0m" in text and "torch: missing [x]" in text and "-> install it" in text


def test_it_works_where_only_the_standard_library_is_installed() -> None:
    program = (
        "import sys\n"
        f"sys.path.insert(0, {str(PROJECT_ROOT)!r})\n"
        "from pretrain.doctor import examine, print_report\n"
        "raise SystemExit(print_report(examine()))\n"
    )
    # -S leaves out site-packages, -I the environment's paths: nothing that was installed can be imported.
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True)
    assert done.returncode == EXIT_BAD_INPUT, done.stderr
    assert "torch: cannot be imported" in done.stdout and "-> pip install 'torch" in done.stdout


def test_this_installation_is_sound() -> None:
    """The tests' own environment has the packages, and ours are found under their names."""
    of_software = [
        finding for finding in examine() if finding.name.startswith(("name ", "packages", "Python", "torch"))
    ]
    assert len(of_software) >= 5
    assert [finding for finding in of_software if not finding.ok] == []
