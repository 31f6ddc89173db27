"""What passes between the two halves of the connector, a message each way with every step and a page of counters, and what
vLLM's HTTP server says to its engine."""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import astuple, dataclass, field, fields

import msgspec

from chiasm.ec_transfer import ECConnectorMetadata, ECConnectorStats
from chiasm.ec_transfer.stores.writer import StoreWrites
from chiasm.wire import ECPlace

AWAITED_METHOD = "chiasm_awaited_embeddings"
"""The method of vLLM's engine by which its HTTP server asks which embeddings requests need next that are neither in memory nor
coming."""
MISSING_METHOD = "chiasm_missing_embeddings"
"""The method by which it asks which embeddings requests need next that are not in memory, whether or not they are coming."""
LOST_METHOD = "chiasm_lost_embeddings"
"""The method by which a question waits until some embeddings are lost; its arguments are the asker and the JSON of their names.
Without names it ends the asker's question."""
EXPECT_METHOD = "chiasm_expect_embeddings"
"""The method by which it says where embeddings are; its argument is the JSON of EmbeddingPlaces."""
PLACE_METHOD = "chiasm_embeddings_place"
"""The method by which it asks where the embeddings of an encoder are; returns the JSON of :class:`Exchange`."""
LOAD_METHOD = "chiasm_load"
"""The method by which it asks what the engine has to do; the answer is the JSON of a :class:`chiasm.wire.Load`."""
UNFETCHED_METHOD = "chiasm_unfetched_embeddings"
"""The method by which it asks how many embeddings others have yet to fetch."""
WAITS_METHOD = "chiasm_tell_waits"
"""The method by which it asks the engine to tell with its outputs how long requests have waited for embeddings."""
TELL_WORK_METHOD = "chiasm_tell_work"
"""The method by which it asks the engine to tell with its outputs what computing prompts has cost."""


class Exchange(msgspec.Struct, frozen=True):
    """How the connector of an engine exchanges embeddings."""

    store: str = ""
    """Names the place that holds the entries (``ECConnector.store_id``)."""
    place: ECPlace | None = None
    """Where consumers find what is encoded here, if they don't find it without."""
    max_received_bytes: int | None = None
    """Size of the largest embedding that can be brought in here (``ECConnector.max_received_bytes``)."""


STORE_PREFIX = "store_"
_WRITES = tuple(counter.name for counter in fields(StoreWrites) if counter.name != "queued_bytes")
_NAMES = (*(counter.name for counter in fields(ECConnectorStats)), *(f"{STORE_PREFIX}{name}" for name in _WRITES))
_PAGE = struct.Struct(f"={len(_NAMES)}d")


@dataclass(frozen=True)
class StepMetadata:
    """From the scheduler to the workers, with each step."""

    step: int
    loads: ECConnectorMetadata
    """The connector's own metadata: what is loaded, and where the scheduler keeps it."""
    expected: dict[str, tuple[int, int]] = field(default_factory=dict)
    """The shapes of the embeddings that must be in the encoder cache once this step has loaded, by identifier."""
    publish: tuple[str, ...] = ()
    """Identifiers of embeddings in the encoder cache that consumers don't find any more."""
    counters: str = ""
    """The path of the page in which the first worker keeps its counters."""


@dataclass(frozen=True)
class StepReport:
    """From the workers to the scheduler, after a step that loads."""

    step: int
    failed: frozenset[str] = frozenset()
    """Identifiers that could not be loaded, and are zeros now."""

    def aggregate(self, other: StepReport) -> StepReport:
        """Return the report of several ranks: what failed on any of them has failed."""
        return StepReport(min(self.step, other.step), self.failed | other.failed)


class CounterPage:
    """The scheduler's side of the page of memory in which the first worker keeps its counters.

    vLLM has a way for workers to report counters with a step, but drops the reports in some roles and model runners.
    """

    def __init__(self) -> None:
        self._descriptor = os.memfd_create("chiasm-ec-counters")
        os.ftruncate(self._descriptor, _PAGE.size)
        self._last = dict.fromkeys(_NAMES, 0.0)

    @property
    def path(self) -> str:
        """Where workers on this host open the page; empty once it is closed."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}" if self._descriptor >= 0 else ""

    def added(self) -> dict[str, float]:
        """Return by how much each counter has grown since the last call."""
        if self._descriptor < 0:
            return {}
        now = dict(zip(_NAMES, _PAGE.unpack(os.pread(self._descriptor, _PAGE.size, 0)), strict=True))
        added = {name: value - self._last[name] for name, value in now.items()}
        self._last = now
        return added

    def close(self) -> None:
        """Release the page; idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class CounterWriter:
    """The worker's side of the page."""

    def __init__(self, path: str) -> None:
        """Open the page. Raises OSError where it cannot be opened, as on another host."""
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._page = mmap.mmap(descriptor, _PAGE.size)
        finally:
            os.close(descriptor)

    def write(self, stats: ECConnectorStats, writes: StoreWrites | None) -> None:
        """Replace all counters. ``writes`` are those of the shared cache, if there is one."""
        stored = [0 if writes is None else getattr(writes, name) for name in _WRITES]
        _PAGE.pack_into(self._page, 0, *astuple(stats), *stored)
