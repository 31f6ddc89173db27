"""The devices that a plan may use: what a person writes for them, and what their datasheets say."""

from __future__ import annotations

import re
from dataclasses import dataclass

from chiasm.cores import allowed_cpus, usable_cores
from chiasm.errors import ConfigurationError

MAX_DEVICES = 64
"""More devices make more candidates than anybody wants to wait for."""
_GROUP = re.compile(r"(\d+)\s*[xX*]\s*([\w .-]+)|([\w .-]+)")
_CPU = re.compile(r"cpu(?::(\d+))?", re.IGNORECASE)
_TERA, _GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU. Rates are per second and one way; FLOPs are dense, of bfloat16 with float32 accumulation."""

    name: str
    flops: float
    memory_bytes_per_second: float
    memory_bytes: float
    host_bytes_per_second: float
    """Over PCIe, to the memory of the host: the way of embeddings."""
    peer_bytes_per_second: float
    """To another GPU of the machine: the way of KV. Without NVLink it is that through the host."""
    source: str
    """Where these figures are from."""


def _gpu(name: str, tera_flops: float, bandwidth: float, memory: float, pcie: float, nvlink: float, source: str) -> Gpu:
    """Return a GPU, given bandwidths in GB/s, memory in GB, and 0 for a GPU without NVLink."""
    return Gpu(
        name,
        tera_flops * _TERA,
        bandwidth * _GIGA,
        memory * _GIGA,
        pcie * _GIGA,
        (nvlink or pcie / 2) * _GIGA,
        source,
    )


GPUS = {
    gpu.name.lower(): gpu
    for gpu in (
        _gpu("H100", 989.4, 3350, 80, 64, 450, "NVIDIA H100 datasheet, SXM; half of the figure with sparsity"),
        _gpu("H200", 989.4, 4800, 141, 64, 450, "NVIDIA H200 datasheet, SXM; half of the figure with sparsity"),
        _gpu("A100", 312, 2039, 80, 32, 300, "NVIDIA A100 80GB datasheet, SXM"),
        _gpu("L4", 121, 300, 24, 32, 0, "NVIDIA L4 datasheet; half of the figure with sparsity"),
        _gpu("L40S", 362, 864, 48, 32, 0, "NVIDIA L40S datasheet; half of the figure with sparsity"),
        _gpu("RTX4090", 165.2, 1008, 24, 32, 0, "NVIDIA Ada GPU architecture whitepaper, appendix A"),
        _gpu(
            "B200", 2250, 8000, 180, 64, 900, "NVIDIA HGX B200 datasheet, an eighth of it; half of that with sparsity"
        ),
    )
}
_OTHER_NAMES = {"h100sxm": "h100", "a10080": "a100", "a10080gb": "a100", "4090": "rtx4090", "geforcertx4090": "rtx4090"}


@dataclass(frozen=True)
class Cpu:
    """This machine's cores."""

    cores: int
    cpus: tuple[int, ...] = ()
    """Those to run on, as many as ``cores``; empty for all that can be used."""

    @property
    def name(self) -> str:
        return f"cpu:{self.cores}"


Device = Gpu | Cpu


def parse_devices(text: str) -> tuple[Device, ...]:
    """Return the devices of ``8xH100``, ``4xL4,2xH100`` or ``cpu:2``, in that order. Raises ConfigurationError."""
    groups = [group.strip() for group in text.split(",")]
    if cpus := [group for group in groups if _CPU.fullmatch(group)]:
        if len(groups) > 1:
            raise ConfigurationError(
                f"--devices {text!r} has {cpus[0]} and more; plan for GPUs or for this machine's cores."
            )
        return (_cpu(groups[0]),)
    found = [gpu for group in groups for gpu in _gpus(group, text)]
    if len(found) > MAX_DEVICES:
        raise ConfigurationError(f"--devices {text!r} has {len(found)} devices; a plan is for at most {MAX_DEVICES}.")
    return tuple(found)


def _cpu(group: str) -> Cpu:
    match = _CPU.fullmatch(group)
    assert match is not None
    usable = usable_cores()
    cores = usable if match[1] is None else int(match[1])
    if not 1 <= cores <= usable:
        raise ConfigurationError(
            f"--devices {group}: this machine has {usable} usable cores; give 1 to {usable} of them."
        )
    return Cpu(cores, tuple(sorted(allowed_cpus())[:cores]) if cores < usable else ())


def _gpus(group: str, text: str) -> list[Gpu]:
    match = _GROUP.fullmatch(group)
    if match is None:
        raise ConfigurationError(
            f"--devices {text!r} is not understood at {group!r}; write for example 8xH100, 4xL4,2xH100 or cpu:2."
        )
    count, name = int(match[1] or 1), match[2] or match[3]
    key = re.sub(r"[ ._-]", "", name).lower()
    gpu = GPUS.get(_OTHER_NAMES.get(key, key))
    if gpu is None:
        known = ", ".join(gpu.name for gpu in GPUS.values())
        raise ConfigurationError(f"--devices: there are no figures for {name!r}; known are {known}, and cpu:N.")
    if not 1 <= count <= MAX_DEVICES:
        raise ConfigurationError(f"--devices {group!r}: give 1 to {MAX_DEVICES} devices of a kind.")
    return [gpu] * count
