"""Memory and peak rate of data-centre GPUs, and whether a plan fits one."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from pretrain.errors import InputError

# Left for the driver's context, communication libraries and memory that the allocator cannot join up.
USABLE_FRACTION = 0.92


@dataclass(frozen=True)
class GPU:
    """One GPU model, by its vendor's data sheet.

    Attributes:
        memory_bytes: device memory.
        peak_flops_per_second: dense bfloat16 matrix products.
    """

    memory_bytes: int
    peak_flops_per_second: float


GPUS: dict[str, GPU] = {
    "a100-40gb": GPU(40 * 2**30, 312e12),
    "a100-80gb": GPU(80 * 2**30, 312e12),
    "h100": GPU(80 * 2**30, 989.4e12),
    "h200": GPU(141 * 10**9, 989.4e12),
    "b200": GPU(180 * 10**9, 2250e12),
    "mi300x": GPU(192 * 10**9, 1307.4e12),
}
ALIASES = {"a100": "a100-80gb"}

# Parts of the names that drivers give, the more special first, and the peak rate of each: cards of one name are not
# equally fast in every form.
DEVICES = {
    "a100": 312e12,
    "h100 pcie": 756e12,
    "h100 nvl": 835e12,
    "h100": 989.4e12,
    "gh200": 989.4e12,
    "h200": 989.4e12,
    "b200": 2250e12,
    "mi300x": 1307.4e12,
}


@dataclass(frozen=True)
class GPUFit:
    """Whether the heaviest rank of a plan fits one GPU.

    Attributes:
        name: key of :data:`GPUS`.
        memory_bytes: device memory.
        usable_bytes: what of it a run may plan with.
        fits: whether the heaviest rank stays within that.
        peak_flops_per_second: of one GPU, dense bfloat16 matrix products.
        tokens_per_second_at_peak: of all ranks together, if every useful FLOP ran at that rate and the
            pipeline never idled: an upper bound, to be multiplied by the utilisation one expects.
    """

    name: str
    memory_bytes: int
    usable_bytes: int
    fits: bool
    peak_flops_per_second: float
    tokens_per_second_at_peak: float


def device_peak_flops_per_second(device_name: str) -> float | None:
    """Peak rate of dense bfloat16 products of the device that a driver names so; None where it is not known."""
    name = device_name.lower()
    return next((peak for part, peak in DEVICES.items() if part in name), None)


def fit(name: str, bytes_per_rank: int, flops_per_token: float, world_size: int) -> GPUFit:
    """Compares the heaviest rank's bytes with a GPU.

    Raises:
        InputError: the GPU is not in the table.
    """
    key = name.lower().replace("_", "-")
    key = ALIASES.get(key, key)
    if key not in GPUS:
        known = sorted([*GPUS, *ALIASES])
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise InputError(f"unknown GPU '{name}'; {hint}known are {', '.join(known)}")
    gpu = GPUS[key]
    usable = int(gpu.memory_bytes * USABLE_FRACTION)
    return GPUFit(
        name=key,
        memory_bytes=gpu.memory_bytes,
        usable_bytes=usable,
        fits=bytes_per_rank <= usable,
        peak_flops_per_second=gpu.peak_flops_per_second,
        tokens_per_second_at_peak=world_size * gpu.peak_flops_per_second / flops_per_token,
    )
