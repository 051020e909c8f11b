"""GPUs that people train on: memory, rates and links, and whether a plan fits one.

Figures are those of the vendors' data sheets. Vendors give links as the sum of both directions; here they are of one.
What stands between nodes is that of the vendor's own system, or, for cards that are sold without one, an assumption
that is named.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from pretrain.errors import InputError

# Left for the driver's context, communication libraries and memory that the allocator cannot join up.
USABLE_FRACTION = 0.92

_GB, _TB = 1e9, 1e12
# 16 lanes, one direction: PCI Express 4.0 and 5.0.
_PCIE4, _PCIE5 = 31.5 * _GB, 63.0 * _GB
# Of cards without a system of the vendor's: 100 Gbit/s Ethernet for a node of eight.
_SHARED_ETHERNET = 100e9 / 8 / 8


@dataclass(frozen=True)
class GPU:
    """One GPU model.

    Attributes:
        memory_bytes: device memory.
        peak_flops_per_second: dense bfloat16 matrix products, sums in float32.
        memory_bytes_per_second: of device memory.
        node_link_bytes_per_second: what one GPU can send to the others of its node, one direction.
        network_bytes_per_second: what one GPU can send to other nodes, one direction.
        gpus_per_node: that reach each other over the node's link.
        driver_name: part of the name that drivers give it, as whole words, in lower case.
    """

    memory_bytes: int
    peak_flops_per_second: float
    memory_bytes_per_second: float
    node_link_bytes_per_second: float
    network_bytes_per_second: float
    gpus_per_node: int
    driver_name: str


GPUS: dict[str, GPU] = {
    # "NVIDIA A100 Tensor Core GPU" data sheet, SXM; NVLink 600 GB/s; DGX A100: one 200 Gbit/s adapter a GPU.
    "a100-40gb": GPU(40 * 2**30, 312e12, 1.555 * _TB, 300 * _GB, 25 * _GB, 8, "a100"),
    "a100-80gb": GPU(80 * 2**30, 312e12, 2.039 * _TB, 300 * _GB, 25 * _GB, 8, "a100"),
    # "NVIDIA H100 Tensor Core GPU" data sheet, SXM; NVLink 900 GB/s; DGX H100: one 400 Gbit/s adapter a GPU.
    "h100": GPU(80 * 2**30, 989.4e12, 3.35 * _TB, 450 * _GB, 50 * _GB, 8, "h100"),
    # The same sheet, PCIe; NVLink bridges join only pairs, so the node's link is PCI Express; network assumed.
    "h100-pcie": GPU(80 * 2**30, 756e12, 2.0 * _TB, _PCIE5, 25 * _GB, 8, "h100 pcie"),
    # "NVIDIA H100 NVL" product brief: 94 GB, 3.94 TB/s; links as of the PCIe card.
    "h100-nvl": GPU(94 * 10**9, 835e12, 3.938 * _TB, _PCIE5, 25 * _GB, 8, "h100 nvl"),
    # "NVIDIA GH200 Grace Hopper Superchip" data sheet: 96 GB of HBM3, 4 TB/s; one GPU a node, one 400 Gbit/s adapter.
    "gh200": GPU(96 * 10**9, 989.4e12, 4.0 * _TB, 450 * _GB, 50 * _GB, 1, "gh200"),
    # "NVIDIA H200 Tensor Core GPU" data sheet, SXM; DGX H200: one 400 Gbit/s adapter a GPU.
    "h200": GPU(141 * 10**9, 989.4e12, 4.8 * _TB, 450 * _GB, 50 * _GB, 8, "h200"),
    # "NVIDIA DGX B200" data sheet, an eighth of it: 1,440 GB, 64 TB/s, NVLink 14.4 TB/s, eight 400 Gbit/s adapters;
    # bfloat16 4.5 PFLOP/s with sparsity, half of it dense.
    "b200": GPU(180 * 10**9, 2250e12, 8.0 * _TB, 900 * _GB, 50 * _GB, 8, "b200"),
    # "NVIDIA GB200 NVL72" data sheet, a 72nd of it: 13.4 TB, 576 TB/s, NVLink 130 TB/s, 360 PFLOP/s with sparsity.
    "gb200": GPU(186 * 10**9, 2500e12, 8.0 * _TB, 900 * _GB, 50 * _GB, 72, "gb200"),
    # "AMD Instinct MI250X" data sheet, one of its two dies, each of which the driver shows as a GPU; as in Frontier's
    # nodes eight dies, four 200 Gbit/s adapters, and the slowest Infinity Fabric link between dies.
    "mi250x": GPU(64 * 10**9, 191.5e12, 1.6 * _TB, 50 * _GB, 12.5 * _GB, 8, "mi250x"),
    # "AMD Instinct MI300X" data sheet; seven Infinity Fabric links of 128 GB/s; one 400 Gbit/s adapter a GPU.
    "mi300x": GPU(192 * 10**9, 1307.4e12, 5.3 * _TB, 448 * _GB, 50 * _GB, 8, "mi300x"),
    # "AMD Instinct MI325X" data sheet; links as of the MI300X.
    "mi325x": GPU(256 * 10**9, 1307.4e12, 6.0 * _TB, 448 * _GB, 50 * _GB, 8, "mi325x"),
    # "AMD Instinct MI355X" data sheet; seven links of 153.6 GB/s; one 400 Gbit/s adapter a GPU.
    "mi355x": GPU(288 * 10**9, 2516.6e12, 8.0 * _TB, 537.6 * _GB, 50 * _GB, 8, "mi355x"),
    # "NVIDIA L40S" data sheet; PCI Express 4.0; network assumed.
    "l40s": GPU(48 * 10**9, 362.05e12, 0.864 * _TB, _PCIE4, 12.5 * _GB, 8, "l40s"),
    # "NVIDIA L4" data sheet: 242 TFLOP/s with sparsity; network assumed.
    "l4": GPU(24 * 10**9, 121e12, 0.3 * _TB, _PCIE4, _SHARED_ETHERNET, 8, "l4"),
    # "NVIDIA A10" data sheet; network assumed.
    "a10": GPU(24 * 10**9, 125e12, 0.6 * _TB, _PCIE4, _SHARED_ETHERNET, 8, "a10"),
    # "NVIDIA A40" data sheet; NVLink bridges join only pairs; network assumed.
    "a40": GPU(48 * 10**9, 149.7e12, 0.696 * _TB, _PCIE4, 12.5 * _GB, 8, "a40"),
    # "NVIDIA Ampere GA102 GPU Architecture" white paper: sums in float32; bridges join only pairs; network assumed.
    "rtx-a6000": GPU(48 * 2**30, 154.8e12, 0.768 * _TB, _PCIE4, _SHARED_ETHERNET, 8, "rtx a6000"),
    "rtx-3090": GPU(24 * 2**30, 71e12, 0.936 * _TB, _PCIE4, _SHARED_ETHERNET, 8, "rtx 3090"),
    # "NVIDIA Ada GPU Architecture" white paper: sums in float32; network assumed.
    "rtx-6000-ada": GPU(48 * 2**30, 364.2e12, 0.96 * _TB, _PCIE4, _SHARED_ETHERNET, 8, "rtx 6000 ada"),
    "rtx-4090": GPU(24 * 2**30, 165.2e12, 1.008 * _TB, _PCIE4, _SHARED_ETHERNET, 8, "rtx 4090"),
    # "NVIDIA RTX Blackwell GPU Architecture" white paper: sums in float32; network assumed.
    "rtx-5090": GPU(32 * 2**30, 209.5e12, 1.792 * _TB, _PCIE5, _SHARED_ETHERNET, 8, "rtx 5090"),
}
ALIASES = {"a100": "a100-80gb", "mi250": "mi250x", "a6000": "rtx-a6000"}


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
    found = [gpu for gpu in GPUS.values() if re.search(rf"\b{re.escape(gpu.driver_name)}\b", name)]
    # Cards of one name are not equally fast in every form: the longer name is the more special one.
    return max(found, key=lambda gpu: len(gpu.driver_name)).peak_flops_per_second if found else None


def find_gpu(name: str) -> tuple[str, GPU]:
    """A GPU of the table and its key there; case, spaces and underscores do not matter.

    Raises:
        InputError: the GPU is not in the table.
    """
    key = re.sub(r"[_\s]+", "-", name.strip().lower())
    key = ALIASES.get(key, key)
    if key not in GPUS:
        known = sorted([*GPUS, *ALIASES])
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise InputError(f"unknown GPU '{name}'; {hint}known are {', '.join(known)}")
    return key, GPUS[key]


def usable_bytes(gpu: GPU) -> int:
    """What of a GPU's memory a run may plan with."""
    return int(gpu.memory_bytes * USABLE_FRACTION)


def fit(name: str, bytes_per_rank: int, flops_per_token: float, world_size: int) -> GPUFit:
    """Compares the heaviest rank's bytes with a GPU.

    Raises:
        InputError: the GPU is not in the table.
    """
    key, gpu = find_gpu(name)
    usable = usable_bytes(gpu)
    return GPUFit(
        name=key,
        memory_bytes=gpu.memory_bytes,
        usable_bytes=usable,
        fits=bytes_per_rank <= usable,
        peak_flops_per_second=gpu.peak_flops_per_second,
        tokens_per_second_at_peak=world_size * gpu.peak_flops_per_second / flops_per_token,
    )
