"""The NVIDIA GPUs of this machine, as their driver's library (NVML) lists them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

_logger = logging.getLogger(__name__)
MIG_PREFIX = "MIG-"
_T = TypeVar("_T")


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU, or one of the instances into which it is divided (MIG)."""

    name: str
    """The number or UUID by which CUDA_VISIBLE_DEVICES or ``nvidia-smi`` names it; of a MIG device always the UUID."""
    model: str = ""
    """Empty if the driver doesn't list it."""
    memory_bytes: int = 0
    """0 if the driver doesn't tell, as of GPUs that share the memory of the machine."""
    uuid: str = ""
    free_bytes: int = 0
    capability: float = 0.0
    """CUDA's compute capability; 0 if it isn't known."""

    @property
    def kind(self) -> str:
        """Model and memory in words; the same for GPUs that are alike."""
        return f"{self.model}, {self.memory_bytes / 2**30:.0f} GiB" if self.model else "unknown"


class NoDriverError(Exception):
    """Why the GPUs can't be listed; a clause without full stop."""


def list_gpus() -> tuple[Gpu, ...]:
    """Return all GPUs in the order of ``nvidia-smi``; in place of a GPU that is divided, its MIG devices.

    A GPU that is lost is left out, and logged. Raises NoDriverError.
    """
    import pynvml as nvml

    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise NoDriverError(f"there is no NVIDIA GPU, or no driver for one ({_said(error)})") from None
    try:
        return tuple(gpu for index in range(nvml.nvmlDeviceGetCount()) for gpu in _gpus_at(nvml, index))
    except nvml.NVMLError as error:
        raise NoDriverError(f"the NVIDIA driver doesn't list its GPUs ({_said(error)})") from None
    finally:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _gpus_at(nvml: Any, index: int) -> Iterator[Gpu]:
    """Yield the GPU with this number, or its MIG devices; nothing if it is lost."""
    try:
        gpu = nvml.nvmlDeviceGetHandleByIndex(index)
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(gpu)
        capability = float(f"{major}.{minor}")
        if not _is_divided(nvml, gpu):
            yield _describe(nvml, gpu, str(index), capability)
            return
        found = [_mig_device(nvml, gpu, slot) for slot in range(nvml.nvmlDeviceGetMaxMigDeviceCount(gpu))]
        for device in found:
            if device is not None:
                yield _describe(nvml, device, "", capability)
    except nvml.NVMLError as error:
        _logger.warning("GPU %d cannot be used: %s.", index, _said(error))


def _describe(nvml: Any, device: Any, number: str, capability: float) -> Gpu:
    uuid = str(nvml.nvmlDeviceGetUUID(device))
    memory = _if_supported(nvml, lambda: nvml.nvmlDeviceGetMemoryInfo(device))
    total, free = (int(memory.total), int(memory.free)) if memory is not None else (0, 0)
    return Gpu(number or uuid, str(nvml.nvmlDeviceGetName(device)), total, uuid, free, capability)


def _is_divided(nvml: Any, gpu: Any) -> bool:
    mode = _if_supported(nvml, lambda: nvml.nvmlDeviceGetMigMode(gpu))  # current and pending
    return mode is not None and mode[0] == nvml.NVML_DEVICE_MIG_ENABLE


def _mig_device(nvml: Any, gpu: Any, slot: int) -> Any:
    """Return the MIG device in a slot; None if the slot is empty."""
    try:
        return nvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, slot)
    except (nvml.NVMLError_NotFound, nvml.NVMLError_InvalidArgument):
        return None


def _if_supported(nvml: Any, ask: Callable[[], _T]) -> _T | None:
    try:
        return ask()
    except nvml.NVMLError_NotSupported:
        return None


def _said(error: Exception) -> str:
    return str(error).rstrip(".")
