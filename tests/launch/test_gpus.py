"""What is made of the answers of the driver's library, which these tests play."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from chiasm.launch.gpus import Gpu, NoDriverError, list_gpus

GIB = 1 << 30


@dataclass(frozen=True)
class Device:
    """A GPU, or a MIG device of one."""

    name: str
    uuid: str
    total: int | None = 80 * GIB
    is_lost: bool = False
    has_mig: bool = True
    slots: tuple[Device | None, ...] = ()
    """MIG devices; a GPU that has any is divided."""


Play = Callable[..., None]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Play:
    """``play(device, …)`` has the library list these GPUs."""

    def play(*gpus: Device) -> None:
        def at(index: int) -> Device:
            if gpus[index].is_lost:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
            return gpus[index]

        def memory(device: Device) -> Any:
            if device.total is None:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
            return SimpleNamespace(total=device.total, free=device.total - GIB)

        def mode(device: Device) -> list[int]:
            if not device.has_mig:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
            return [int(bool(device.slots)), 0]

        def mig(device: Device, slot: int) -> Device:
            found = device.slots[slot]
            if found is None:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
            return found

        answers: dict[str, Callable[..., Any]] = {
            "nvmlInit": lambda: None,
            "nvmlShutdown": lambda: None,
            "nvmlDeviceGetCount": lambda: len(gpus),
            "nvmlDeviceGetHandleByIndex": at,
            "nvmlDeviceGetCudaComputeCapability": lambda device: (9, 0),
            "nvmlDeviceGetMigMode": mode,
            "nvmlDeviceGetMaxMigDeviceCount": lambda device: len(device.slots),
            "nvmlDeviceGetMigDeviceHandleByIndex": mig,
            "nvmlDeviceGetUUID": lambda device: device.uuid,
            "nvmlDeviceGetName": lambda device: device.name,
            "nvmlDeviceGetMemoryInfo": memory,
        }
        for name, answer in answers.items():
            monkeypatch.setattr(pynvml, name, answer)

    return play


def test_gpus_are_listed_with_what_the_driver_tells(play: Play) -> None:
    play(Device("NVIDIA H100", "GPU-aa"), Device("NVIDIA GB10", "GPU-bb", total=None, has_mig=False))
    assert list_gpus() == (
        Gpu("0", "NVIDIA H100", 80 * GIB, "GPU-aa", 79 * GIB, 9.0),
        Gpu("1", "NVIDIA GB10", 0, "GPU-bb", 0, 9.0),
    )


def test_a_divided_gpu_is_listed_as_its_mig_devices_by_their_uuids(play: Play) -> None:
    slots = (Device("NVIDIA H100 MIG 1g.10gb", "MIG-1", 10 * GIB), None, Device("NVIDIA H100 MIG 2g.20gb", "MIG-2"))
    play(Device("NVIDIA H100", "GPU-aa", slots=slots), Device("NVIDIA H100", "GPU-bb"))
    assert [(gpu.name, gpu.uuid) for gpu in list_gpus()] == [("MIG-1", "MIG-1"), ("MIG-2", "MIG-2"), ("1", "GPU-bb")]
    assert list_gpus()[0] == Gpu("MIG-1", "NVIDIA H100 MIG 1g.10gb", 10 * GIB, "MIG-1", 9 * GIB, 9.0)


def test_a_lost_gpu_is_reported_and_the_others_are_found(play: Play, caplog: pytest.LogCaptureFixture) -> None:
    play(Device("", "", is_lost=True), Device("NVIDIA A10", "GPU-bb"))
    assert [gpu.name for gpu in list_gpus()] == ["1"]
    assert "GPU 0 cannot be used: GPU is lost" in caplog.text


@pytest.mark.parametrize("code", [pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED])
def test_a_missing_driver_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def fail() -> None:
        raise pynvml.NVMLError(code)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    with pytest.raises(NoDriverError, match="no NVIDIA GPU, or no driver"):
        list_gpus()
