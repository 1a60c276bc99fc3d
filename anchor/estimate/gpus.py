"""Memory, peak speed and links of the accelerators that a dry run knows, and of the machine it runs on.

Peaks are the vendors' dense bfloat16 figures without sparsity. Memory is the total that ``nvidia-smi`` reports. Links
are one direction of NVLink, or of PCIe if there is no NVLink. Between nodes the default is 50 GB/s per GPU: one 400
Gb/s adapter each.
"""

import os
from dataclasses import dataclass

from anchor.errors import ConfigError, did_you_mean

ADAPTER_BYTES_PER_SECOND = 50e9


@dataclass(frozen=True, slots=True)
class Gpu:
    """One kind of accelerator.

    Attributes:
        name: name on the command line.
        memory_bytes: total memory.
        bf16_flops: peak FLOP/s, a multiply and an add counted as two; None if no datasheet gives it.
        link_bytes_per_second: speed to the other GPUs of its node, one direction.
    """

    name: str
    memory_bytes: int
    bf16_flops: float | None
    link_bytes_per_second: float


_MIB = 1 << 20
_DATASHEETS = (
    Gpu("h100-80gb", 81559 * _MIB, 989.4e12, 450e9),
    Gpu("h200", 143771 * _MIB, 989.4e12, 450e9),
    Gpu("b200", 183359 * _MIB, 2250e12, 900e9),
    Gpu("a100-80gb", 81920 * _MIB, 312e12, 300e9),
    Gpu("a100-40gb", 40960 * _MIB, 312e12, 300e9),
    Gpu("l40s", 46068 * _MIB, 362.05e12, 32e9),
    Gpu("l4", 23034 * _MIB, 121e12, 32e9),
)
NAMES = (*(gpu.name for gpu in _DATASHEETS), "cpu")


def find_gpu(name: str, num_ranks: int = 1) -> Gpu:
    """Find an accelerator by name; ``cpu`` is this machine, with its memory shared by the ranks.

    Raises:
        ConfigError: the name is unknown.
    """
    if name == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Gpu("cpu", memory // num_ranks, None, 10e9)
    for gpu in _DATASHEETS:
        if gpu.name == name:
            return gpu
    raise ConfigError(f"--gpu: unknown GPU '{name}'{did_you_mean(name, NAMES)}; known are {', '.join(NAMES)}")


def peak_of_device(device: str) -> float | None:
    """Return the peak bf16 FLOP/s for the name that CUDA gives a device, or None if it is not listed.

    PCIe boards are slower than the listed SXM boards of the same kind, so their peak is not guessed.
    """
    words = device.lower().replace("-", " ").split()
    if "pcie" in words:
        return None
    return next((gpu.bf16_flops for gpu in _DATASHEETS if gpu.name.split("-")[0] in words), None)
