"""A checkpoint of any size is written in the memory of two shards and a tensor, and read in that of a tensor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MIB = 2**20
SHARD, TENSOR, COUNT = 32, 8, 48

# Saving: the peak of all memory. Loading: of the process's own; shards are mapped, and the system takes their pages
# back whenever it needs them.
_PROGRAM = f"""
import json, resource, sys
from pathlib import Path
import torch
from pretrain.checkpoint import CheckpointReader, TensorPiece, write_checkpoint

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def own():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))

def pieces(count):
    for index in range(count):
        shape = ({TENSOR * MIB // 4},)
        yield TensorPiece(f"w{{index}}", "weight", torch.full(shape, float(index)), shape)

torch.set_num_threads(1)
directory = Path(sys.argv[2])
if sys.argv[1] == "save":
    write_checkpoint(directory, 1, pieces(1), {{}})
    before = peak()
    write_checkpoint(directory, 2, pieces({COUNT}), {{}}, max_shard_bytes={SHARD * MIB})
else:
    with CheckpointReader(directory / "step-00000001") as reader:
        reader.read("w0")
    before, most = own(), 0
    with CheckpointReader(directory / "step-00000002") as reader:
        for name in reader.names():
            tensor = reader.read(name)
            assert tensor[:3].tolist() == [float(name[1:])] * 3
            most = max(most, own())
print(json.dumps((peak() if sys.argv[1] == "save" else most) - before))
"""


@pytest.mark.slow
def test_saving_takes_the_memory_of_two_shards_and_loading_that_of_a_tensor(tmp_path: Path) -> None:
    """384 MiB of tensors of 8 MiB in shards of 32 MiB."""
    grown = {}
    for what in ("save", "load"):
        command = [sys.executable, "-c", _PROGRAM, what, str(tmp_path)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        # What the program holds, without the holes that the C library's heap keeps where it freed aligned blocks.
        environment |= {"MALLOC_MMAP_THRESHOLD_": "65536"}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert ended.returncode == 0, ended.stderr
        grown[what] = json.loads(ended.stdout) / MIB
    written = sum(file.stat().st_size for file in (tmp_path / "step-00000002").iterdir())
    assert written > COUNT * TENSOR * MIB
    print(f"{written / MIB:.0f} MiB: peak memory grew by {grown['save']:.0f} MiB to save, {grown['load']:.0f} to load")
    # What is collected, and the library's copy of it while it is written.
    assert grown["save"] < 2 * SHARD + 4 * TENSOR
    assert grown["load"] < 3 * TENSOR
