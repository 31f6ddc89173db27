"""What it costs to bring an embedding from one process's memory to another's through the shared folder."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from chiasm.bench.measurement import Bench, Measurement
from chiasm.bench.outcome import Figure, Outcome, Panel, Series

_MEGABYTE = 1_000_000
_SIZES_BYTES = {"0.5 MB": _MEGABYTE // 2, "10 MB": 10 * _MEGABYTE, "67 MB": 67 * _MEGABYTE}
_FACTOR = 1.3
_EXTRA_SECONDS = 1e-3


class Handoff(Measurement):
    """``chiasm.ec_transfer.handoff_benchmark`` says what is compared, and how."""

    name = "handoff"
    purpose = "Time from an embedding computed to the same embedding usable in PD, at three sizes"
    target = f"at most {_FACTOR} times a plain write and a mapped read of the same bytes, plus 1 ms"

    async def run(self, bench: Bench) -> Outcome:
        from chiasm.ec_transfer.handoff_benchmark import measure_handoff

        outcome = Outcome()
        repeats = bench.samples(31, quick=3)
        folder = _folder()
        bench.step(f"in {folder}")
        bench.total(len(_SIZES_BYTES))
        copies, plains, handoffs = [], [], []
        for label, size_bytes in _SIZES_BYTES.items():
            (result,) = await asyncio.to_thread(measure_handoff, folder, [size_bytes], repeats)
            plain = result.plain_write_seconds + result.mapped_read_seconds
            allowed = _FACTOR * plain + _EXTRA_SECONDS
            outcome.figures += [
                Figure(f"{label}: handoff", 1000 * result.handoff_seconds, "ms", 1000 * allowed),
                Figure(f"{label}: handoff / plain write and read", result.ratio, "x"),
                Figure(f"{label}: one memcpy", 1000 * result.memcpy_seconds, "ms"),
            ]
            copies.append(Series(f"{label}, memcpy", [1000 * result.memcpy_seconds]))
            plains.append(Series(f"{label}, write + read", [1000 * plain]))
            handoffs.append(Series(f"{label}, handoff", [1000 * result.handoff_seconds], 1000 * allowed))
            bench.advance()
        series = [one for group in zip(copies, plains, handoffs, strict=True) for one in group]
        outcome.panels.append(Panel("handoff: medians", "ms", series, logarithmic=True))
        return outcome


def _folder() -> Path:
    """Where a deployment of one machine keeps its embeddings."""
    from chiasm.launch.folders import SHARED_MEMORY

    return SHARED_MEMORY if SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
