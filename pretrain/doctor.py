"""Looks at the environment: versions, clashes, what is missing, and in words what to do about it.

Imports only the standard library before it looks, so that it works where everything else is missing.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pretrain.errors import EXIT_BAD_INPUT, EXIT_DONE
from pretrain.observe.environment import (
    DISTRIBUTION,
    PROJECT_ROOT,
    available_cpu_cores,
    installed_version,
    package_name,
    required_packages,
)

Level = Literal["error", "warning", "information"]

_OLDEST_PYTHON = (3, 11)
_TOP_LEVEL_NAMES = ("kernels", "data", "pretrain")
# Packages that only one feature needs; training works without it.
_ONLY_FOR = {
    "wandb": "the section 'wandb' of a configuration",
    "matplotlib": "'pretrain report'",
    "datasets": "data from Hugging Face datasets",
    "tokenizers": "data.tokenizer.type=huggingface",
    "sentencepiece": "data.tokenizer.type=sentencepiece",
    "protobuf": "data.tokenizer.type=sentencepiece and the section 'wandb' of a configuration",
    "hat-splitter": "data.tokenizer.type=hierarchical_bytes",
    "transformers": "'pretrain export' and 'pretrain import'",
}
_FREE_DISK_GIGABYTES = 10


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what was looked at, in a word or two.
        ok: whether nothing needs to be done.
        level: ``error`` keeps training from working, ``warning`` costs something, ``information`` neither.
        message: what was found.
        remedy: what to do; empty where ``ok``.
    """

    name: str
    ok: bool
    level: Level
    message: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Look at everything; takes the seconds that importing torch takes, and raises nothing."""
    findings: list[Finding] = []
    for look in (_python, _packages, _top_level_names, _triton, _torch, _machine):
        findings += look()
    return findings


def print_report(findings: list[Finding]) -> int:
    """Print the findings, what to do about each, and a last line; the exit code is 2 if there is an error."""
    errors = sum(finding.level == "error" for finding in findings)
    warnings = sum(finding.level == "warning" for finding in findings)
    print_line = _printer()
    for finding in findings:
        print_line(finding.level, f"{finding.name}: {finding.message}")
        if finding.remedy:
            print_line("remedy", finding.remedy)
    if errors:
        print_line("summary", f"{errors} error(s), {warnings} warning(s): training will not work as it is")
    else:
        print_line("summary", f"ready to train, {warnings} warning(s)" if warnings else "ready to train")
    return EXIT_BAD_INPUT if errors else EXIT_DONE


_MARKS = {"error": "ERROR", "warning": "warn", "information": "ok", "remedy": "", "summary": ""}
_STYLES = {"error": "bold red", "warning": "yellow", "information": "green"}


def _printer() -> Callable[[str, str], None]:
    """Prints (kind, text) with rich on a terminal; plainly, one line each, elsewhere or where rich is missing."""
    try:
        from rich.console import Console
        from rich.padding import Padding
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return _print_plainly
    console = Console(highlight=False)
    if not console.is_terminal:
        return _print_plainly

    def print_line(kind: str, text: str) -> None:
        if kind == "summary":
            console.print(Padding(Text(text, style="bold"), (1, 0, 0, 0)))
            return
        row = Table.grid(padding=(0, 1))
        row.add_column(width=5)
        row.add_column()
        body = Text(f"-> {text}" if kind == "remedy" else text, style="bold" if kind == "remedy" else "")
        row.add_row(Text(_MARKS[kind], style=_STYLES.get(kind, "")), body)
        console.print(row)

    return print_line


def _print_plainly(kind: str, text: str) -> None:
    print(f"{_MARKS[kind]:6}" + ("-> " if kind == "remedy" else "") + text)


def _good(name: str, message: str) -> Finding:
    return Finding(name, True, "information", message)


def _python() -> Iterator[Finding]:
    version = platform.python_version()
    oldest = ".".join(map(str, _OLDEST_PYTHON))
    if sys.version_info[:2] < _OLDEST_PYTHON:
        remedy = f"make a virtual environment with Python {oldest} or newer and install there"
        yield Finding("Python", False, "error", f"{version} is older than {oldest}", remedy)
    else:
        yield _good("Python", version)
    if not sys.platform.startswith("linux"):
        remedy = "use Linux, a container or WSL: run directories are locked with Linux calls"
        yield Finding("operating system", False, "error", f"{sys.platform} is not supported", remedy)


def _packages() -> Iterator[Finding]:
    requirements = required_packages()
    if not requirements:
        remedy = f"install the project ('pip install -e .' in its source tree), which registers {DISTRIBUTION}"
        yield Finding("packages", False, "warning", "what this project requires is not known here", remedy)
        return
    try:
        from packaging.requirements import Requirement
    except ImportError:
        remedy = "pip install packaging"
        yield Finding("packages", False, "warning", "versions are not checked: packaging is missing", remedy)
        return
    good = []
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = installed_version(requirement.name)
        if version is not None and requirement.specifier.contains(version, prereleases=True):
            good.append(f"{requirement.name} {version}")
            continue
        use = _ONLY_FOR.get(requirement.name)
        found = "is not installed" if version is None else f"{version} does not satisfy {requirement.specifier}"
        message = found + (f"; only {use} needs it" if use else "")
        yield Finding(requirement.name, False, "warning" if use else "error", message, f"pip install '{text}'")
    yield _good("packages", f"{len(good)} of {len(requirements)} fit: {', '.join(good)}")


def _top_level_names() -> Iterator[Finding]:
    """Whether ``import kernels`` and the like give ours; a package ``kernels`` of others is widespread."""
    providers = importlib.metadata.packages_distributions()
    for name in _TOP_LEVEL_NAMES:
        ours = PROJECT_ROOT / name
        others = sorted({other for other in providers.get(name, []) if other != DISTRIBUTION})
        uninstall = f"pip uninstall {' '.join(others)}" if others else ""
        found = _location(name)
        if found != ours:
            where = f"gives {found}" if found else "finds nothing"
            owner = f", which {' and '.join(others)} installed" if others and found else ""
            remedy = f"put {PROJECT_ROOT} first on PYTHONPATH, or run from there"
            if others:
                remedy = f"{uninstall} (or use an environment of its own); otherwise {remedy}"
            message = f"'import {name}' {where}{owner}, not this project's {ours}"
            yield Finding(f"name {name}", False, "error", message, remedy)
        elif others:
            message = (
                f"'import {name}' gives this project's package, but {' and '.join(others)} installed one of the same "
                f"name; libraries that expect the other one (transformers expects Hugging Face's kernels) get ours "
                f"and fail"
            )
            yield Finding(f"name {name}", False, "error", message, uninstall + ", or use an environment of its own")
        else:
            yield _good(f"name {name}", f"'import {name}' gives this project's package")


def _location(name: str) -> Path | None:
    """The directory that ``import name`` would read, without importing it."""
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    if found is None:
        return None
    if found.submodule_search_locations:
        return Path(next(iter(found.submodule_search_locations))).resolve()
    return Path(found.origin).resolve() if found.origin else None


def _triton() -> Iterator[Finding]:
    triton, numpy = installed_version("triton"), installed_version("numpy")
    if triton is None:
        remedy = "pip install triton; until then the kernels' slower PyTorch forms are used"
        yield Finding("triton", False, "warning", "is not installed, so there are no GPU kernels", remedy)
    elif numpy is not None and _release(triton) < (3, 9) and _release(numpy) >= (2, 4):
        message = (
            f"triton {triton} with numpy {numpy}: Triton 3.6 breaks in its interpreter on loops whose bound is an "
            f"argument when numpy is 2.4 or newer (3.9.0 does not)"
        )
        yield Finding("triton", False, "warning", message, "pip install 'numpy<2.4', or 'triton>=3.9'")
    else:
        yield _good("triton", f"{triton} with numpy {numpy}")


def _release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (3, 9) of 3.9.0+git."""
    numbers = []
    for part in version.split("+")[0].split(".")[:2]:
        digits = "".join(character for character in part if character.isdigit())
        numbers.append(int(digits or 0))
    return tuple(numbers)


def _torch() -> Iterator[Finding]:
    try:
        torch = importlib.import_module("torch")
    except Exception as error:  # a broken build raises anything, from OSError to AttributeError
        message = f"cannot be imported ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        wanted = next((text for text in required_packages() if package_name(text) == "torch"), "torch")
        yield Finding("torch", False, "error", message, f"pip install '{wanted}'")
        return
    yield _good("torch", f"{torch.__version__} from {Path(torch.__file__).parent}")
    yield from _cuda(torch)
    distributed = torch.distributed.is_available()
    for backend, needed in (("gloo", True), ("nccl", torch.cuda.is_available())):
        if not needed:
            continue
        if distributed and getattr(torch.distributed, f"is_{backend}_available")():
            yield _good(backend, "available")
        else:
            message = "this build of torch has none, so processes cannot exchange gradients"
            yield Finding(backend, False, "error", message, "install an official build of torch for Linux")


def _cuda(torch: Any) -> Iterator[Finding]:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        yield _good("CUDA", f"{torch.version.cuda}, {len(names)} device(s): {', '.join(sorted(set(names)))}")
        if not any(map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))):
            remedy = "install gcc, or set CC"
            yield Finding("C compiler", False, "error", "Triton needs one to launch kernels; none found", remedy)
    elif Path("/proc/driver/nvidia/version").exists():
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for the CPU alone"
        message = f"there is an NVIDIA driver, but torch (built {built}) sees no device"
        remedy = "install a build of torch for CUDA that the driver supports, and look at CUDA_VISIBLE_DEVICES"
        yield Finding("CUDA", False, "warning", message, remedy)
    else:
        yield _good("CUDA", "no device: training runs on the CPU, which is for small models")


def _machine() -> Iterator[Finding]:
    cores = available_cpu_cores()
    yield _good("CPU cores", f"{cores} of {os.cpu_count()} may be used")
    here = Path.cwd()
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(here).free / 1e9
        message = f"{free:.1f} GB free in {here}"
        if free >= _FREE_DISK_GIGABYTES:
            yield _good("disk", message)
        else:
            remedy = "free some or point run.directory elsewhere; a checkpoint takes 12 bytes a parameter"
            yield Finding("disk", False, "warning", message, remedy)
