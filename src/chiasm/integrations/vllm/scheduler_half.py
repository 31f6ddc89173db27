"""What runs in vLLM's scheduler: which requests wait for an entry, what a step loads, which requests fail.

vLLM asks in this order, for one request after the other: ``ensure_cache_available`` (whether it may run at all); for each
of its items that is not in memory ``is_out_of_reach`` and ``can_get`` (whether prefill goes so far) and ``has_cache_item``
(whether the item is loaded or encoded); ``update_state_after_alloc`` for each that is given room. ``build_connector_meta``
ends the step. After the step come ``take_unavailable_requests`` and ``update_connector_output``.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

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
"""Steps whose entries are kept although no worker has reported them. vLLM has two or so under way."""
_MAX_SPOILED = 1024
_MIN_POLL_SECONDS, _MAX_POLL_SECONDS = 0.0005, 0.01
_POLL_SHARE = 0.01
"""Of the time waited so far, so that the delay stays within a hundredth of it."""


class EncoderMemory(Protocol):
    """What vLLM's scheduler believes to be in the workers' memory."""

    def holds(self, identifier: str) -> bool: ...

    def forget(self, identifier: str) -> bool:
        """Have vLLM load or encode the item anew when it is next wanted. False while a request makes use of it."""


@dataclass(frozen=True)
class Reach:
    """How far prefill goes while items are not there yet.

    ``window_tokens`` is how far ahead of a request's computed tokens one step can get: items beyond it need not be there.
    ``max_ahead`` is how many requests may begin although an item in that window is missing, and run up to it; they hold a
    place among the running ones while they wait. One begins for ``min_tokens`` or more, and goes on for any number above
    ``lookahead_tokens``, those that a draft model looks ahead.
    """

    window_tokens: int
    max_ahead: int = 0
    min_tokens: int = 64
    lookahead_tokens: int = 0


class SchedulerHalf:
    """Answers yes only for what cannot be lost until the worker has it, since a miss there stops vLLM's engine.

    ``is_producer`` and ``is_reader``: whether what is encoded here is published, and whether a language model runs here that
    reads it.
    """

    def __init__(
        self,
        store: SharedStorageConnector,
        settings: Settings,
        layout: Layout,
        metadata_fields: MetadataFields,
        *,
        reach: Reach,
        is_producer: bool,
        is_reader: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._wait_seconds = settings.wait_seconds
        self._layout = layout
        self._metadata_fields = metadata_fields
        self._reach = reach
        self._is_producer = is_producer
        self._is_reader = is_reader
        self._clock = clock
        self._memory: EncoderMemory | None = None
        self._counters = CounterPage()
        self._counts: dict[str, float] = {}
        self._own_stats = asdict(store.stats)

        self._requests: dict[str, TrackedRequest] = {}
        self._deferred: dict[str, TrackedRequest] = {}
        self._unavailable: set[str] = set()
        self._ahead: set[str] = set()
        # Of what vLLM believes to be in memory: what is zeros there, and what is in the store alone.
        self._zeros: set[str] = set()
        self._elsewhere: set[str] = set()
        # Items of which vLLM's prefix cache may hold wrong blocks.
        self._spoiled: set[str] = set()
        # Of the step that is being scheduled.
        self._step = 1
        self._current: TrackedRequest | None = None
        self._promised: dict[str, tuple[int, int]] = {}
        self._from_store: set[str] = set()
        self._expected: dict[str, tuple[int, int]] = {}
        self._publish: dict[str, None] = {}
        # Keeps the copies of entries that steps under way load.
        self._pinned: deque[tuple[int, ECConnectorMetadata]] = deque(maxlen=_MAX_PINNED_STEPS)

    def attach(self, memory: EncoderMemory) -> None:
        """Called once, before the first request."""
        self._memory = memory

    def shutdown(self) -> None:
        self._pinned.clear()
        self._counters.close()

    # ---- a request is looked at -----------------------------------------------------------------------------------

    def ensure_cache_available(self, request: Any, num_computed_tokens: int) -> bool:
        """Whether the request can run a step: all items that the step touches are there, or can be encoded here."""
        tracked = self._current = self._tracked(request)
        tracked.stop = None
        if tracked.refusal is not None or tracked.request_id in self._unavailable:
            return False
        begins = request.num_computed_tokens == 0
        if begins and self._is_spoiled(tracked, num_computed_tokens):
            request.skip_reading_prefix_cache = True
            return False
        if not begins and num_computed_tokens >= tracked.end:
            return True
        end = num_computed_tokens + self._reach.window_tokens
        for index, item in tracked.between(num_computed_tokens, end):
            if self._is_available(tracked, item):
                continue
            if tracked.request_id in self._unavailable:
                return False
            if not self._may_run_ahead(tracked, item.offset - num_computed_tokens, begins):
                self._defer(tracked, item)
                return False
            tracked.stop = index
            end = item.offset
            break
        if tracked.stop is None:
            self._ahead.discard(tracked.request_id)
        else:
            self._ahead.add(tracked.request_id)
        self._go_on(tracked)
        # What the prefix cache gives to a request that begins is as good as what its blocks were made from.
        used = tracked.between(0 if begins else num_computed_tokens, end)
        tracked.counted_on.update((item.identifier, self._step) for _, item in used)
        return True

    def is_out_of_reach(self, request_id: str, index: int) -> bool:
        """Whether the step that is being scheduled has to stop before the item, which is not in memory."""
        stop = self._requests[request_id].stop
        return stop is not None and index >= stop

    def can_get(self, request_id: str, index: int) -> bool:
        """Whether the item can be loaded or encoded in the step that is being scheduled; a yes is a promise.

        Called when there is room for it, right before ``has_cache_item``.
        """
        item = self._requests[request_id].items[index]
        return item.has_pixels or self._is_promised(item)

    def has_cache_item(self, identifier: str) -> bool:
        """Whether the item of the request that was looked at last is loaded; if not, vLLM encodes it."""
        item = self._current.item(identifier) if self._current is not None else None
        # Encoding an item that has no pixels would stop the engine.
        from_store = item is not None and (self._is_promised(item) or not item.has_pixels)
        if from_store:
            self._from_store.add(identifier)
        else:
            self._from_store.discard(identifier)
        return from_store

    def update_state_after_alloc(self, request: Any, index: int) -> None:
        tracked = self._requests[request.request_id]
        item = tracked.items[index]
        self._zeros.discard(item.identifier)
        self._elsewhere.discard(item.identifier)
        if item.identifier not in self._from_store:
            self._add("misses")
            return
        self._add("hits")
        if not self._is_reader:
            self._elsewhere.add(item.identifier)
            return
        self._expected[item.identifier] = self._promised.get(item.identifier, (item.rows, self._layout.width))
        self._store.update_state_after_alloc(tracked, index)

    def released(self, identifier: str) -> None:
        """A request makes no use of the item any more. What no worker has in memory is not to be taken for it."""
        if identifier in self._elsewhere and self._holder.forget(identifier):
            self._elsewhere.discard(identifier)

    def build_connector_meta(self) -> StepMetadata:
        """Of the step that was scheduled."""
        loads = self._store.build_connector_meta()
        metadata = StepMetadata(
            step=self._step,
            loads=loads,
            expected=self._expected,
            publish=tuple(self._publish),
            counters=self._counters.path,
        )
        if loads.loads:
            self._pinned.append((self._step, loads))
        self._step += 1
        self._current = None
        self._promised = {}
        self._from_store = set()
        self._expected = {}
        self._publish = {}
        return metadata

    # ---- a step is done -------------------------------------------------------------------------------------------

    def update_connector_output(self, report: StepReport) -> None:
        """Let go of what has been loaded, and fail every request that has counted on what has not."""
        while self._pinned and self._pinned[0][0] <= report.step:
            self._pinned.popleft()
        for identifier in report.failed:
            if self._holder.holds(identifier):
                self._zeros.add(identifier)
            if len(self._spoiled) <= _MAX_SPOILED:
                self._spoiled.add(identifier)
            for tracked in self._requests.values():
                if tracked.counted_on.get(identifier, -1) >= report.step:
                    self._fail(tracked, f"item {identifier} could not be loaded")

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
        self._ahead.discard(request.request_id)
        self._unavailable.discard(request.request_id)

    def is_published(self, identifier: str) -> bool:
        try:
            return self._store.published(check_identifier(identifier)) is not None
        except InvalidRequestError:
            return False

    def take_counts(self) -> dict[str, float]:
        """What both halves have counted since the last call."""
        counts, self._counts = self._counts, {}
        own = asdict(self._store.stats)
        for name, value in self._counters.added().items():
            counts[name] = counts.get(name, 0) + value + own[name] - self._own_stats[name]
        self._own_stats = own
        return {name: value for name, value in counts.items() if value}

    # ---- while nothing runs -----------------------------------------------------------------------------------------

    @property
    def num_deferred(self) -> int:
        """Requests that wait for an entry."""
        return len(self._deferred)

    def has_news(self) -> bool:
        """Whether one of them can go on or has waited too long."""
        now = self._clock()
        return any(
            now - since > self._wait_seconds or self.is_published(tracked.missing)
            for tracked in self._deferred.values()
            if (since := tracked.deferred_since) is not None
        )

    def poll_seconds(self) -> float:
        """After which to look again."""
        latest = max(tracked.deferred_since or 0.0 for tracked in self._deferred.values())
        return min(max((self._clock() - latest) * _POLL_SHARE, _MIN_POLL_SECONDS), _MAX_POLL_SECONDS)

    # ---- what is there --------------------------------------------------------------------------------------------

    @property
    def _holder(self) -> EncoderMemory:
        assert self._memory is not None, "vLLM has made its scheduler without chiasm's encoder cache manager"
        return self._memory

    def _is_available(self, tracked: TrackedRequest, item: TrackedItem) -> bool:
        """Whether the item is in memory, can be encoded here, or stands in the store; none of them is a promise."""
        identifier = item.identifier
        if self._holder.holds(identifier):
            if identifier not in self._zeros:
                if self._is_producer and identifier not in self._elsewhere and not self.is_published(identifier):
                    self._publish[identifier] = None
                return True
            if not self._holder.forget(identifier):
                return False
            self._zeros.discard(identifier)
        if item.has_pixels:
            return True
        header = self._store.published(identifier)
        if header is None:
            return False
        if (misfit := self._layout.misfit(header, item.rows)) is not None:
            self._fail(tracked, f"item {identifier}: {misfit}")
            return False
        return True

    def _is_promised(self, item: TrackedItem) -> bool:
        """Whether the store has the entry; on a reader it then stays loadable until the step is over."""
        if item.identifier not in self._promised:
            header = self._store.published(item.identifier)
            if header is None or self._layout.misfit(header, item.rows) is not None:
                return False
            if not self._store.has_cache_item(item.identifier):
                return False
            self._promised[item.identifier] = (header.shape[0], header.shape[1])
        return self._promised[item.identifier][0] == item.rows

    def _is_spoiled(self, tracked: TrackedRequest, num_computed_tokens: int) -> bool:
        """Whether the prefix cache gives blocks that may have been computed from zeros."""
        if not self._spoiled:
            return False
        hit = tracked.between(0, num_computed_tokens)
        return any(item.identifier in self._spoiled or len(self._spoiled) > _MAX_SPOILED for _, item in hit)

    # ---- waiting and failing --------------------------------------------------------------------------------------

    def _tracked(self, request: Any) -> TrackedRequest:
        tracked = self._requests.get(request.request_id)
        if tracked is not None and len(tracked.items) == len(request.mm_features):
            return tracked
        if tracked is not None:  # A session whose client has sent more.
            self._go_on(tracked)
        tracked = self._requests[request.request_id] = TrackedRequest.of(request, self._metadata_fields)
        if tracked.refusal is not None:
            self._fail(tracked, tracked.refusal)
        return tracked

    def _may_run_ahead(self, tracked: TrackedRequest, tokens: int, begins: bool) -> bool:
        """Whether the request computes the ``tokens`` before an item that is missing."""
        reach = self._reach
        if tokens <= reach.lookahead_tokens or reach.max_ahead == 0:
            return False
        has_place = tracked.request_id in self._ahead or len(self._ahead) < reach.max_ahead
        return not begins or (tokens >= reach.min_tokens and has_place)

    def _defer(self, tracked: TrackedRequest, item: TrackedItem) -> None:
        tracked.missing = item.identifier
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
