"""A page of memory in which a worker keeps its counters, and the scheduler reads them.

vLLM passes on what a worker reports with a step only for some roles and model runners (an encoder's report is dropped by
the first generation's), so the counters take a way of their own.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import astuple, fields

from chiasm.ec_transfer import ECConnectorStats

_NAMES = tuple(field.name for field in fields(ECConnectorStats))
_PAGE = struct.Struct(f"={len(_NAMES)}d")


class CounterPage:
    """The scheduler's side: makes the page, and says what has been added since it was last asked."""

    def __init__(self) -> None:
        self._descriptor = os.memfd_create("chiasm-ec-counters")
        os.ftruncate(self._descriptor, _PAGE.size)
        self._last = dict.fromkeys(_NAMES, 0.0)

    @property
    def path(self) -> str:
        """Where workers on this host open it, as long as the object is not closed."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}" if self._descriptor >= 0 else ""

    def added(self) -> dict[str, float]:
        if self._descriptor < 0:
            return {}
        now = dict(zip(_NAMES, _PAGE.unpack(os.pread(self._descriptor, _PAGE.size, 0)), strict=True))
        added = {name: value - self._last[name] for name, value in now.items()}
        self._last = now
        return added

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class CounterWriter:
    """The worker's side."""

    def __init__(self, path: str) -> None:
        """Raises OSError where the page cannot be opened, as on another host."""
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._page = mmap.mmap(descriptor, _PAGE.size)
        finally:
            os.close(descriptor)

    def write(self, stats: ECConnectorStats) -> None:
        _PAGE.pack_into(self._page, 0, *astuple(stats))
