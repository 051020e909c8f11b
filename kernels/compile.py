"""Compile the Triton kernels of this package ahead of time, for GPUs that need not be present.

`python -m kernels.compile` prints, for every kernel at the shapes of 7B models in bf16 and
for every target, the registers per thread, the bytes spilled to memory, the shared memory per program and the
size of the binary. The launches are those that training makes: the launch code runs on tensors of the `meta`
device, with an executor that lists launches instead of running them.

Compiling needs nothing but triton: registers are read with the `cuobjdump` and spills with the `ptxas` that
it ships.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from kernels.launch import Launch, interpreter_is_active

TARGETS = ("sm_80", "sm_90", "sm_100")
COLUMNS = ("kernel", "target", "registers", "spill_bytes", "shared_bytes", "cubin_bytes")

_TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


def families() -> dict[str, Callable[[], list[Launch]]]:
    """Every family of kernels that can be compiled: each folder beside this file with a ``compiled.py``.

    Its ``launches()`` lists the launches that training makes at 7B head shapes in bf16.
    """
    found = {}
    for folder in sorted(Path(__file__).parent.iterdir()):
        if (folder / "compiled.py").is_file():
            found[folder.name] = importlib.import_module(f"kernels.{folder.name}.compiled").launches
    return found


def registered_launches() -> list[Launch]:
    """The launches of all families, each kernel once.

    Raises:
        ValueError: two families have a kernel of the same name.
    """
    owners: dict[str, str] = {}
    found: dict[str, Launch] = {}
    for family, launches in families().items():
        for launch in launches():
            name = launch.kernel.__name__
            first = found.setdefault(name, launch)
            if first.kernel is not launch.kernel:
                raise ValueError(f"kernels.{family} and kernels.{owners[name]} both have a kernel named {name}")
            owners.setdefault(name, family)
    return list(found.values())


def compile_launch(launch: Launch, target: str) -> dict[str, Any]:
    """Compile one launch for one target such as "sm_90".

    Returns:
        kernel, target, registers (per thread), spill_bytes (stores and loads together, per thread),
        shared_bytes (per program) and cubin_bytes.

    Raises:
        RuntimeError: if the interpreter replaced the compiler, a tool is missing or compilation fails.
        ValueError: if the target is not of the form sm_NN.
    """
    matched = re.fullmatch(r"sm_(\d+)", target)
    if matched is None:
        raise ValueError(f"The target must look like sm_90, got {target!r}.")
    if interpreter_is_active():
        raise RuntimeError("Kernels cannot be compiled under the interpreter: unset TRITON_INTERPRET.")
    capability = int(matched.group(1))
    try:
        assembler, disassembler = get_ptxas(capability), triton.knobs.nvidia.cuobjdump
    except RuntimeError as error:
        raise RuntimeError(
            f"{error} in triton {triton.__version__}: install triton from its official wheel, which ships it."
        ) from error
    compiled = triton.compile(
        _source(launch),
        target=GPUTarget("cuda", capability, 32),
        options=launch.options(),
    )
    cubin, ptx = compiled.asm["cubin"], compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as directory:
        binary, assembly = Path(directory, "kernel.cubin"), Path(directory, "kernel.ptx")
        binary.write_bytes(cubin)
        assembly.write_text(ptx)
        usage = _run_tool(disassembler.path, "--dump-resource-usage", str(binary))
        # Instructions of one architecture only, such as wgmma, need the target that the PTX itself names.
        architecture = re.search(r"^\.target\s+(\w+)", ptx, re.MULTILINE).group(1)
        # As triton calls it; older versions of ptxas do not know the option.
        allocation = ["--regAllocOptLevel=2"] if int(assembler.version.split(".")[0]) >= 13 else []
        output = str(Path(directory, "unused"))
        verbose = _run_tool(
            assembler.path, "-v", *allocation, f"--gpu-name={architecture}", str(assembly), "-o", output
        )
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None:
        raise RuntimeError(f"cuobjdump reported no register count for {launch.kernel.__name__}: {usage}")
    return {
        "kernel": launch.kernel.__name__,
        "target": target,
        "registers": int(registers.group(1)),
        "spill_bytes": sum(int(count) for count in re.findall(r"(\d+) bytes spill", verbose)),
        "shared_bytes": compiled.metadata.shared,
        "cubin_bytes": len(cubin),
    }


def compile_report(targets: Sequence[str] = TARGETS) -> list[dict[str, Any]]:
    """Compile every registered kernel for every target; see `compile_launch` for the entries."""
    return [compile_launch(launch, target) for launch in registered_launches() for target in targets]


def _source(launch: Launch) -> ASTSource:
    """The launch as a compiler input, specialised as at run time on ones and on multiples of 16."""
    signature: dict[str, str] = {}
    constants = dict(launch.constants)
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, name in enumerate(launch.kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        argument = launch.arguments[name]
        if isinstance(argument, torch.Tensor):
            signature[name] = _TYPES[argument.dtype]
            aligned = True
        elif isinstance(argument, float):
            signature[name] = "fp32"
            aligned = False
        elif argument == 1:
            signature[name] = "constexpr"
            constants[name] = 1
            aligned = False
        else:
            signature[name] = "i32" if -(2**31) <= argument < 2**31 else "i64"
            aligned = argument % 16 == 0
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def _run_tool(path: str, *arguments: str) -> str:
    """Standard output and error of one of the binaries that triton ships."""
    done = subprocess.run([path, *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{path} failed with exit code {done.returncode}: {done.stderr.strip()}")
    return done.stdout + done.stderr


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """The report as plain text, one line per kernel and target."""
    cells = [list(COLUMNS)] + [[str(row[column]) for column in COLUMNS] for row in rows]
    widths = [max(len(line[index]) for line in cells) for index in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index < 2 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: `python -m kernels.compile [--targets sm_80 sm_90] [--kernels NAME ...] [--json]`."""
    parser = argparse.ArgumentParser(prog="python -m kernels.compile", description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), help="such as sm_80 sm_90 sm_100")
    parser.add_argument("--kernels", nargs="+", help="names of kernels; all registered ones if absent")
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    options = parser.parse_args(arguments)
    launches = {launch.kernel.__name__: launch for launch in registered_launches()}
    names = options.kernels or list(launches)
    unknown = [name for name in names if name not in launches]
    if unknown:
        print(f"Unknown kernel {unknown[0]!r}; registered are {', '.join(launches)}.", file=sys.stderr)
        return 2
    try:
        rows = [compile_launch(launches[name], target) for name in names for target in options.targets]
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(rows) if options.json else format_table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
