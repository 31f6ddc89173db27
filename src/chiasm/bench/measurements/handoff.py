"""What it costs to hand an embedding from an encoder to a language model, over each connector."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import secrets
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from chiasm.bench.handed_over import WantingRequest, bytes_of, made_embedding, seconds_of, taken_in_step
from chiasm.bench.load import alternate
from chiasm.bench.measurement import Bench, Figure, Measurement, Outcome, Panel, Series
from chiasm.bench.memory_handoff import measure_memory_handoff
from chiasm.errors import ConfigurationError
from chiasm.transfer.nixl import import_nixl

if TYPE_CHECKING:
    import torch

_MEGABYTE = 1_000_000
_SIZES_BYTES = {"0.5 MB": _MEGABYTE // 2, "10 MB": 10 * _MEGABYTE, "67 MB": 67 * _MEGABYTE}
_FACTOR = 1.3
_EXTRA_SECONDS = 1e-3


class Handoff(Measurement):
    """``measure_handoff`` says what is compared, and how."""

    name = "handoff"
    purpose = "Time from an embedding computed to the same embedding usable in PD, at three sizes, over each connector"
    target = (
        f"folder: at most {_FACTOR} times a plain write and a mapped read of the same bytes, plus 1 ms; from memory: 1.3 times "
        "a memcpy + 0.3 ms, 1.2 times sendfile to recv_into + 0.5 ms, 1.25 times NIXL's read"
    )

    async def run(self, bench: Bench) -> Outcome:
        outcome = Outcome()
        repeats = bench.samples(31, quick=3)
        folder = _folder()
        bench.phase(f"in {folder}", len(_SIZES_BYTES))
        series: list[Series] = []
        for label, size_bytes in _SIZES_BYTES.items():
            (result,) = await asyncio.to_thread(measure_handoff, folder, [size_bytes], repeats)
            plain = result.plain_write_seconds + result.mapped_read_seconds
            allowed = _FACTOR * plain + _EXTRA_SECONDS
            outcome.figures += [
                Figure(f"{label}: handoff", 1000 * result.handoff_seconds, "ms", 1000 * allowed),
                Figure(f"{label}: handoff / plain write and read", result.ratio, "x"),
                Figure(f"{label}: one memcpy", 1000 * result.memcpy_seconds, "ms"),
            ]
            series += [
                Series(f"{label}, memcpy", [1000 * result.memcpy_seconds]),
                Series(f"{label}, write + read", [1000 * plain]),
                Series(f"{label}, handoff", [1000 * result.handoff_seconds], 1000 * allowed),
            ]
            bench.advance()
        for connector in _limits_of_memory():
            bench.phase(connector, len(_SIZES_BYTES))
            for label, size_bytes in _SIZES_BYTES.items():
                moved = await asyncio.to_thread(measure_memory_handoff, connector, size_bytes, repeats)
                factor, extra_seconds = _limits_of_memory()[connector]
                allowed = 1000 * (factor * moved.bare_seconds + extra_seconds)
                outcome.figures += [
                    Figure(f"{label}: {connector}", 1000 * moved.handoff_seconds, "ms", allowed),
                    Figure(f"{label}: {connector}, the bytes alone", 1000 * moved.bare_seconds, "ms"),
                ]
                series.append(Series(f"{label}, {connector}", [1000 * moved.handoff_seconds], allowed))
                bench.advance()
        outcome.panels.append(Panel("handoff: medians", "ms", series, logarithmic=True))
        return outcome


def _limits_of_memory() -> dict[str, tuple[float, float]]:
    """Return factor and extra seconds that a handoff may take, for each connector from memory that works here."""
    limits = {"SharedMemoryConnector": (1.3, 0.3e-3), "TcpConnector": (1.2, 0.5e-3)}
    with contextlib.suppress(ConfigurationError):
        import_nixl()
        limits["NixlConnector"] = (1.25, 0.0)
    return limits


def _folder() -> Path:
    """Return where a deployment of one machine keeps its embeddings."""
    from chiasm.launch.folders import SHARED_MEMORY

    return SHARED_MEMORY if SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())


@dataclass(frozen=True)
class HandoffResult:
    """Medians in seconds for an embedding of ``size_bytes``; ``measure_handoff`` says what each is."""

    size_bytes: int
    plain_write_seconds: float
    mapped_read_seconds: float
    memcpy_seconds: float
    handoff_seconds: float

    @property
    def ratio(self) -> float:
        """The handoff over a plain write and a mapped read of the same bytes."""
        return self.handoff_seconds / (self.plain_write_seconds + self.mapped_read_seconds)


def measure_handoff(folder: Path, sizes_bytes: Sequence[int], repeats: int) -> list[HandoffResult]:
    """Measure handoffs through SharedStorageConnector in this process, on the CPU, in a temporary folder in ``folder``.

    - The *handoff* begins with an embedding in the producer's memory and ends when every byte of the consumer's tensor has
      been read once, which is done by summing the tensor.
    - The *plain write* creates a file and writes the same bytes with ``os.write``.
    - The *mapped read* opens and maps that file and sums it in the same way.
    - The *memcpy* copies the bytes to memory that is mapped already.

    They take turns ``repeats`` times. Files are removed outside the measured times. Sizes are rounded down to whole rows of
    4096 bytes, at least one.
    """
    with tempfile.TemporaryDirectory(dir=folder) as name:
        return [_measure(Path(name), size, repeats) for size in sizes_bytes]


def _measure(folder: Path, size_bytes: int, repeats: int) -> HandoffResult:
    embedding = made_embedding(size_bytes)
    source = bytes_of(embedding)
    target = np.empty_like(source)
    plain_path = folder / "plain"
    pair = _Pair(folder / "entries", 4 * source.nbytes)

    def write_and_read() -> tuple[float, float]:
        seconds = seconds_of(lambda: _plain_write(plain_path, source)), seconds_of(lambda: _mapped_read(plain_path))
        plain_path.unlink()
        return seconds

    def copy() -> tuple[float]:
        return (seconds_of(lambda: np.copyto(target, source)),)

    def hand_off() -> tuple[float]:
        identifier = secrets.token_hex(32)
        seconds = seconds_of(lambda: pair.hand_off(identifier, embedding))
        pair.remove(identifier)
        return (seconds,)

    return HandoffResult(source.nbytes, *alternate([write_and_read, copy, hand_off], repeats))


class _Pair:
    """A producer, and both halves of a consumer, on one folder."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        from chiasm.ec_transfer.base import ECConnectorRole, ECTransferConfig
        from chiasm.ec_transfer.shared_storage import SharedStorageConnector

        config = ECTransferConfig(connector_extra_config={"shared_storage_path": folder}, max_bytes=max_bytes)
        self._folder = folder
        self._producer = SharedStorageConnector(config, ECConnectorRole.WORKER)
        self._scheduler = SharedStorageConnector(config, ECConnectorRole.SCHEDULER)
        self._worker = SharedStorageConnector(config, ECConnectorRole.WORKER)

    def hand_off(self, identifier: str, embedding: torch.Tensor) -> None:
        self._producer.save_caches({identifier: embedding}, identifier)
        request = WantingRequest.of(identifier, embedding)
        if self._scheduler.ensure_cache_available(request, 0):
            self._scheduler.update_state_after_alloc(request, 0)
        received = taken_in_step(self._scheduler, self._worker)
        _read_every_byte(bytes_of(received[identifier]))

    def remove(self, identifier: str) -> None:
        (self._folder / f"{identifier}.safetensors").unlink()


def _plain_write(path: Path, source: npt.NDArray[np.uint8]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        left = source.data
        while left:
            left = left[os.write(descriptor, left) :]
    finally:
        os.close(descriptor)


def _mapped_read(path: Path) -> None:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        _read_every_byte(np.frombuffer(mapped, dtype=np.uint8))


def _read_every_byte(data: npt.NDArray[np.uint8]) -> int:
    return int(data.view(np.int64).sum())
