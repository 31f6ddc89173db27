"""What runs in vLLM's scheduler: which requests wait for an entry, what a step loads, which requests fail.

vLLM asks in this order, for one request after the other: ``ensure_cache_available`` (whether it may run at all),
``has_cache_item`` for each of its items that is not in memory (a no means: encode it here), ``update_state_after_alloc``
for each item that is given room. ``build_connector_meta`` ends the step. After the step come ``take_unavailable_requests``
and ``update_connector_output``.
"""

from __future__ import annotations

import enum
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from chiasm.ec_transfer import ECConnectorMetadata, check_identifier
from chiasm.ec_transfer.shared_storage import SharedStorageConnector
from chiasm.errors import InvalidRequestError
from chiasm.integrations.vllm.counters import CounterPage
from chiasm.integrations.vllm.layout import Layout
from chiasm.integrations.vllm.settings import Settings
from chiasm.integrations.vllm.step import StepMetadata, StepReport
from chiasm.integrations.vllm.tracked import MetadataFields, TrackedItem, TrackedRequest

_logger = logging.getLogger(__name__)

_MAX_PINNED_STEPS = 64
"""Steps whose entries stay open although no worker has reported them. vLLM has two or so under way."""


class _Source(enum.Enum):
    """Where the embedding of an item that vLLM has no more in memory comes from."""

    STORE = "store"
    ENCODER = "encoder"
    NOWHERE = "nowhere"


class SchedulerHalf:
    """Answers yes only for what cannot be lost until the worker has it, since a miss there stops vLLM's engine.

    ``window_tokens`` is how far ahead of a request's computed tokens one step can reach: items beyond it need not be there
    yet, so that prefill begins before all items of a request are encoded. ``is_producer`` and ``is_reader``: whether what
    is encoded here is published, and whether a language model runs here that reads it.
    """

    def __init__(
        self,
        store: SharedStorageConnector,
        settings: Settings,
        layout: Layout,
        metadata_fields: MetadataFields,
        *,
        window_tokens: int,
        is_producer: bool,
        is_reader: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._wait_seconds = settings.wait_seconds
        self._layout = layout
        self._metadata_fields = metadata_fields
        self._window_tokens = window_tokens
        self._is_producer = is_producer
        self._is_reader = is_reader
        self._clock = clock
        self._counters = CounterPage()
        self._counts: dict[str, float] = {}
        self._own_corrupt_entries = 0

        self._requests: dict[str, TrackedRequest] = {}
        self._deferred: dict[str, TrackedRequest] = {}
        self._unavailable: set[str] = set()
        # What vLLM believes to be in the workers' memory, and those of it that are zeros there.
        self._resident: set[str] = set()
        self._substituted: set[str] = set()
        # Of the step that is being scheduled.
        self._step = 1
        self._current: TrackedRequest | None = None
        self._sources: dict[str, _Source] = {}
        self._allocated: set[str] = set()
        self._expected: dict[str, tuple[int, int]] = {}
        self._reloads: set[str] = set()
        self._publish: dict[str, None] = {}
        # Keeps the files of steps that are under way open.
        self._pinned: deque[tuple[int, ECConnectorMetadata]] = deque(maxlen=_MAX_PINNED_STEPS)

    def shutdown(self) -> None:
        self._pinned.clear()
        self._counters.close()

    # ---- a request is looked at -----------------------------------------------------------------------------------

    def ensure_cache_available(self, request: Any, num_computed_tokens: int) -> bool:
        """Whether all items that the request's next step can touch are there, or can be encoded here."""
        tracked = self._requests.get(request.request_id)
        if tracked is None or len(tracked.items) != len(request.mm_features):
            tracked = self._requests[request.request_id] = TrackedRequest.of(request, self._metadata_fields)
            if tracked.refusal is not None:
                self._fail(tracked, tracked.refusal)
        self._current = tracked
        if tracked.refusal is not None or tracked.request_id in self._unavailable:
            return False
        if num_computed_tokens >= tracked.end:
            return True
        end = num_computed_tokens + self._window_tokens
        needed = [item for item in tracked.items if item.end > num_computed_tokens and item.offset < end]
        for index, item in enumerate(tracked.items):
            if item in needed and not self._is_available(tracked, index, item):
                self._defer(tracked)
                return False
        self._go_on(tracked)
        tracked.needed_at.update((item.identifier, self._step) for item in needed)
        return True

    def _is_available(self, tracked: TrackedRequest, index: int, item: TrackedItem) -> bool:
        identifier = item.identifier
        if identifier in self._resident and identifier not in self._substituted:
            if self._is_producer and not self._store.is_published(identifier):
                self._publish[identifier] = None
            return True
        must_be_loaded = not item.has_pixels or identifier in self._substituted
        if not self._store.has_cache_item(identifier):
            return not must_be_loaded
        if (misfit := self._misfit(item)) is not None:
            if must_be_loaded:
                self._fail(tracked, f"item {identifier}: {misfit}")
            return not must_be_loaded
        if identifier in self._substituted:
            self._store.update_state_after_alloc(tracked, index)
            self._expected[identifier] = (item.rows, self._layout.width)
            self._reloads.add(identifier)
        return True

    def has_cache_item(self, identifier: str) -> bool:
        """Whether the item of the request that was looked at last is loaded; if not, vLLM encodes it.

        For an item that has no pixels the answer is yes in any case: the encoder would stop the engine.
        """
        item = self._current.item(identifier) if self._current is not None else None
        source = self._source(identifier, item)
        self._sources[identifier] = source
        return source is not _Source.ENCODER

    def _source(self, identifier: str, item: TrackedItem | None) -> _Source:
        try:
            found = self._store.has_cache_item(identifier)
        except InvalidRequestError:
            found = False
        if item is None:
            return _Source.ENCODER
        if found and self._misfit(item) is None:
            return _Source.STORE
        return _Source.ENCODER if item.has_pixels else _Source.NOWHERE

    def _misfit(self, item: TrackedItem) -> str | None:
        header = self._store.found(item.identifier)
        return "its entry has gone" if header is None else self._layout.misfit(header, item.rows)

    def update_state_after_alloc(self, request: Any, index: int) -> None:
        tracked = self._requests.get(request.request_id)
        identifier = request.mm_features[index].identifier
        self._allocated.add(identifier)
        source = self._sources.get(identifier)
        if tracked is None or source is None:
            return
        if source is _Source.ENCODER:
            self._add("misses")
            return
        self._expected[identifier] = (tracked.items[index].rows, self._layout.width)
        if source is _Source.STORE:
            self._add("hits")
            self._store.update_state_after_alloc(tracked, index)
        else:
            self._fail(tracked, f"item {identifier} has gone from the store and from memory")

    def build_connector_meta(self, freed: Iterable[str]) -> StepMetadata:
        """Of the step that was scheduled; ``freed`` names what workers drop from their memory before it."""
        freed = set(freed)
        self._resident -= freed
        self._substituted -= freed
        self._resident |= self._allocated
        loads = self._store.build_connector_meta()
        metadata = StepMetadata(
            step=self._step,
            loads=loads,
            expected=self._expected,
            reloads=frozenset(self._reloads),
            publish=tuple(self._publish),
            counters=self._counters.path,
        )
        if not self._is_reader:
            self._release(
                self._counters.steps_done()
            )  # Whether reports of an encoder arrive depends on its model runner.
        if loads.loads:
            self._pinned.append((self._step, loads))
        self._step += 1
        self._current = None
        self._sources = {}
        self._allocated = set()
        self._expected = {}
        self._reloads = set()
        self._publish = {}
        return metadata

    # ---- a step is done -------------------------------------------------------------------------------------------

    def update_connector_output(self, report: StepReport) -> None:
        """Let go of what has been loaded, and fail every request that has counted on what has not."""
        self._release(report.step)
        self._substituted -= report.reloaded
        self._substituted |= report.failed & self._resident
        for identifier in report.failed:
            for tracked in self._requests.values():
                if tracked.needed_at.get(identifier, -1) >= report.step:
                    self._fail(tracked, f"item {identifier} could not be loaded")

    def _release(self, step: int) -> None:
        while self._pinned and self._pinned[0][0] <= step:
            self._pinned.popleft()

    def take_unavailable_requests(self) -> set[str]:
        """The ids of the requests to fail, each once."""
        now = self._clock()
        for tracked in list(self._deferred.values()):
            if tracked.deferred_since is not None and now - tracked.deferred_since > self._wait_seconds:
                self._fail(tracked, f"an embedding has not come within {self._wait_seconds:g} s")
        unavailable, self._unavailable = self._unavailable, set()
        return unavailable

    def request_finished(self, request: Any) -> None:
        tracked = self._requests.pop(request.request_id, None)
        if tracked is not None:
            self._go_on(tracked)
        self._unavailable.discard(request.request_id)

    def is_published(self, identifier: str) -> bool:
        try:
            return self._store.is_published(check_identifier(identifier))
        except InvalidRequestError:
            return False

    def take_counts(self) -> dict[str, float]:
        """What both halves have counted since the last call."""
        counts, self._counts = self._counts, {}
        for name, value in self._counters.added().items():
            counts[name] = counts.get(name, 0) + value
        corrupt = self._store.stats.corrupt_entries
        counts["corrupt_entries"] = counts.get("corrupt_entries", 0) + corrupt - self._own_corrupt_entries
        self._own_corrupt_entries = corrupt
        return {name: value for name, value in counts.items() if value}

    # ---- waiting and failing --------------------------------------------------------------------------------------

    def _defer(self, tracked: TrackedRequest) -> None:
        if tracked.deferred_since is None and tracked.request_id not in self._unavailable:
            tracked.deferred_since = self._clock()
            self._deferred[tracked.request_id] = tracked
            self._add("waits")

    def _go_on(self, tracked: TrackedRequest) -> None:
        """The request no longer waits."""
        if tracked.deferred_since is not None:
            self._add("wait_seconds", self._clock() - tracked.deferred_since)
            tracked.deferred_since = None
            self._deferred.pop(tracked.request_id, None)

    def _fail(self, tracked: TrackedRequest, reason: str) -> None:
        if tracked.request_id in self._unavailable:
            return
        self._go_on(tracked)
        self._unavailable.add(tracked.request_id)
        self._add("failed_requests")
        _logger.warning("request %s fails: %s", tracked.request_id, reason)

    def _add(self, name: str, value: float = 1) -> None:
        self._counts[name] = self._counts.get(name, 0) + value
