"""The connector's half in vLLM's scheduler: which requests wait for an embedding, what a step loads, which requests fail.

vLLM asks in this order. For each request in turn: ``ensure_cache_available`` (may it run at all?); for each of its items that
is not in memory ``is_out_of_reach`` and ``can_get`` (does prefill go that far?) and ``has_cache_item`` (is the item loaded, or
encoded?); and ``update_state_after_alloc`` for each item that got room. ``build_connector_meta`` ends the step. When the
workers have run it come ``take_unavailable_requests`` and ``update_connector_output``.

The connector is told what a request wants when vLLM first asks about the request, brings it in on threads of its own, and
calls ``wake``.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeVar

from chiasm.connectors.faults import log_failure, logged
from chiasm.ec_transfer import ECConnector, ECConnectorMetadata, check_identifier
from chiasm.ec_transfer.faults import expect, not_coming
from chiasm.ec_transfer.losses import LossWatch
from chiasm.ec_transfer.size_check import check_received_size
from chiasm.ec_transfer.stores.reader import StoreReads
from chiasm.errors import InvalidRequestError
from chiasm.integrations.vllm.items import (
    Content,
    Item,
    ItemState,
    Layout,
    MetadataFields,
    SpoiledItems,
    TrackedRequest,
)
from chiasm.integrations.vllm.messages import STORE_PREFIX, CounterPage, StepMetadata, StepReport
from chiasm.integrations.vllm.settings import Settings
from chiasm.integrations.vllm.waits import Wait, Waits
from chiasm.wire import EmbeddingPlaces

_AnswerT = TypeVar("_AnswerT")
_logger = logging.getLogger(__name__)

_MAX_PINNED_STEPS = 64
"""Steps whose entries are kept while no worker has reported them. vLLM has about two under way."""


class EncoderMemory(Protocol):
    """What vLLM's scheduler believes to be in the workers' encoder cache."""

    def holds(self, identifier: str) -> bool: ...

    def forget(self, identifier: str) -> bool:
        """Have vLLM load or encode the item again when it is next wanted; return False if a request still uses it."""


@dataclass(frozen=True)
class Reach:
    """How far prefill goes while items are missing."""

    window_tokens: int
    """Tokens that one step can add to those computed so far: items beyond them need not exist yet."""
    max_ahead: int = 0
    """Maximum number of requests that run up to a missing item in that window. They hold a place among the running requests
    while they wait."""
    min_tokens: int = 64
    """A request begins to run ahead only if it can compute this many tokens; once it has begun, any number is enough."""
    lookahead_tokens: int = 0
    """How many tokens a draft model looks ahead; prefill stops this far before a missing item."""


class SchedulerHalf:
    """Promises only what cannot be lost before the workers have it, since a missing embedding stops vLLM's engine."""

    def __init__(
        self,
        store: ECConnector,
        settings: Settings,
        layout: Layout,
        metadata_fields: MetadataFields,
        *,
        reach: Reach,
        kv_cache_tokens: int,
        is_producer: bool,
        is_reader: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``store`` is the connector's scheduler role. ``is_producer``: whether what is encoded here is published.
        ``is_reader``: whether a language model runs here.
        """
        self._store = store
        self._wait_seconds = settings.wait_seconds
        self._layout = layout
        self._metadata_fields = metadata_fields
        self._reach = reach
        self._is_producer = is_producer
        self._is_reader = is_reader
        self._max_received_bytes = store.max_received_bytes if is_reader else None
        self.clock = clock
        self._attached: EncoderMemory | None = None
        self._counters = CounterPage()
        self._counts: dict[str, float] = {}
        self._own_stats = self._own_counters()
        self.waits = Waits()

        self._requests: dict[str, TrackedRequest] = {}
        self._failed: set[str] = set()
        """Requests whose failure has not been reported to vLLM yet."""
        self._ahead: set[str] = set()
        """Requests that run, or have run, up to an item that is missing."""
        self._items: dict[str, ItemState] = {}
        """Items of this step, and those whose content isn't the embedding."""
        self._spoiled = SpoiledItems(kv_cache_tokens)
        self._step = 1
        self._current: TrackedRequest | None = None
        """The request that vLLM looked at last in this step."""
        self._pinned: deque[tuple[int, ECConnectorMetadata]] = deque(maxlen=_MAX_PINNED_STEPS)
        """Keeps what steps under way load."""
        self._losses = LossWatch(self.not_coming)
        self._has_arrivals = False
        self.on_arrival: Callable[[], None] = lambda: None
        """Called from any thread when a wanted embedding has arrived or was lost; ends the engine's sleep."""
        if is_reader:
            store.set_wake(self._wake)

    def attach(self, memory: EncoderMemory) -> None:
        """Set vLLM's account of the encoder cache; called once, before the first request."""
        self._attached = memory

    def shutdown(self) -> None:
        """End what waits, and release the copies and the counters; idempotent."""
        self._losses.stop()
        self._pinned.clear()
        self._counters.close()

    # ---- a step is scheduled ----------------------------------------------------------------------------------------

    def ensure_cache_available(self, request: Any, num_computed_tokens: int) -> bool:
        """Return whether the request can run in this step: each item that it reaches is there, or can be encoded here."""
        tracked = self._current = self._tracked(request)
        tracked.stop = None
        if tracked.refusal is not None or tracked.request_id in self._failed:
            return False
        begins = request.num_computed_tokens == 0
        if begins and any(item.identifier in self._spoiled for _, item in tracked.between(0, num_computed_tokens)):
            request.skip_reading_prefix_cache = True
            return False
        if tracked.is_new:
            tracked.is_new = False
            if self._is_reader and not self._has_told(tracked, num_computed_tokens):
                return False
        if not begins and num_computed_tokens >= tracked.end:
            return True
        end = num_computed_tokens + self._reach.window_tokens
        for index, item in tracked.between(num_computed_tokens, end):
            if self._is_available(tracked, item):
                continue
            if tracked.request_id in self._failed:
                return False
            if not self._may_run_ahead(tracked, item.offset - num_computed_tokens, begins):
                self._defer(tracked, index)
                return False
            tracked.stop = index
            end = item.offset
            break
        if tracked.stop is None:
            self._ahead.discard(tracked.request_id)
        else:
            self._ahead.add(tracked.request_id)
        self._end_wait(tracked)
        # What the prefix cache gives to a request that begins is as good as the embeddings that its blocks were made from.
        used = tracked.between(0 if begins else num_computed_tokens, end)
        tracked.counted_on.update((item.identifier, self._step) for _, item in used)
        return True

    def is_out_of_reach(self, request_id: str, index: int) -> bool:
        """Return whether prefill has to stop before the item, which is not in memory."""
        stop = self._requests[request_id].stop
        return stop is not None and index >= stop

    def can_get(self, request_id: str, index: int) -> bool:
        """Return whether the item can be loaded or encoded in this step; a yes is a promise.

        Called if there is room for it, right before ``has_cache_item``.
        """
        item = self._requests[request_id].items[index]
        return item.has_pixels or self._is_promised(item)

    def has_cache_item(self, identifier: str) -> bool:
        """Return whether an item of the request that was looked at last is loaded; if not, vLLM encodes it."""
        item = self._current.item(identifier) if self._current is not None else None
        # Encoding an item that has no pixels would stop the engine.
        is_loaded = item is not None and (self._is_promised(item) or not item.has_pixels)
        self._state(identifier).is_loaded = is_loaded
        return is_loaded

    def update_state_after_alloc(self, request: Any, index: int) -> None:
        """Note that vLLM has made room for an item: it is loaded or encoded in this step."""
        tracked = self._requests[request.request_id]
        item = tracked.items[index]
        state = self._state(item.identifier)
        state.content = Content.EMBEDDING
        if not state.is_loaded:
            self._count("misses")
            return
        self._count("hits")
        if self._is_reader:
            state.expected = state.promised or (item.rows, self._layout.width)
            with logged(self._store, f"note that item {item.identifier} is loaded, so the requests that use it fail"):
                self._store.update_state_after_alloc(tracked, index)
        else:
            state.content = Content.NOTHING

    def build_connector_meta(self, num_scheduled_tokens: int) -> StepMetadata:
        """Return the message to the workers for the step that was scheduled, and begin the next one."""
        loads, items = ECConnectorMetadata(), self._items
        with logged(self._store, "say what the step loads, so the requests that need any of it fail"):
            loads = self._store.build_connector_meta()
        metadata = StepMetadata(
            step=self._step,
            loads=loads,
            expected={identifier: state.expected for identifier, state in items.items() if state.expected is not None},
            publish=tuple(identifier for identifier, state in items.items() if state.is_republished),
            counters=self._counters.path,
        )
        if loads.loads:
            self._pinned.append((self._step, loads))
        self._items = {
            identifier: ItemState(content=state.content)
            for identifier, state in items.items()
            if state.content is not Content.EMBEDDING and self._memory.holds(identifier)
        }
        if self._losses.is_asked:
            self._losses.note_missing(self.missing())
        self._spoiled.advance(num_scheduled_tokens)
        self._step += 1
        self._current = None
        return metadata

    # ---- a step is done ---------------------------------------------------------------------------------------------

    def update_connector_output(self, report: StepReport) -> None:
        """Release what has been loaded, and fail every request that used what could not be loaded."""
        while self._pinned and self._pinned[0][0] <= report.step:
            self._pinned.popleft()
        for identifier in report.failed:
            if self._memory.holds(identifier) and not self._memory.forget(identifier):
                self._state(identifier).content = Content.ZEROS
            self._spoiled.add(identifier)
            for tracked in self._requests.values():
                if tracked.counted_on.get(identifier, -1) >= report.step:
                    self._fail(tracked, f"Item {identifier} could not be loaded.")

    def take_unavailable_requests(self) -> set[str]:
        """Return the ids of the requests to fail, each once."""
        now = self.clock()
        for tracked in self._requests.values():
            if tracked.waiting_since is None or now - tracked.waiting_since <= self._wait_seconds:
                continue
            item = tracked.item(tracked.missing)
            if item is not None and self._is_available(tracked, item):
                self._end_wait(tracked)  # vLLM has had no place for the request since, and has not looked at it
            else:
                self._fail(tracked, f"Item {tracked.missing} did not arrive within {self._wait_seconds:g} seconds.")
        failed, self._failed = self._failed, set()
        return failed

    def released(self, identifier: str) -> None:
        """Have vLLM forget an item that the workers don't have, now that a request no longer uses it."""
        state = self._items.get(identifier)
        if state is not None and state.content is not Content.EMBEDDING and self._memory.forget(identifier):
            state.content = Content.EMBEDDING

    def request_finished(self, request: Any) -> list[Wait]:
        """Forget a request that is finished, whatever the reason; return how it has waited."""
        tracked = self._requests.pop(request.request_id, None)
        if tracked is not None:
            self._forget(tracked)
        self._ahead.discard(request.request_id)
        self._failed.discard(request.request_id)
        return self.waits.finish(request.request_id)

    def is_published(self, identifier: str) -> bool:
        """Return whether consumers find what was encoded here; False for a name that is not an identifier."""
        try:
            check_identifier(identifier)
        except InvalidRequestError:
            return False
        with logged(self._store, f"tell whether item {identifier} is published, so it counts as not published"):
            return self._store.is_published(identifier)
        return False

    def take_counts(self) -> dict[str, float]:
        """Return what both halves have counted since the last call, without zeros."""
        counts, self._counts = self._counts, {}
        own = self._own_counters()
        added = self._counters.added()
        for name in own.keys() | added.keys():
            counts[name] = counts.get(name, 0) + added.get(name, 0) + own.get(name, 0) - self._own_stats.get(name, 0)
        self._own_stats = own
        return {name: value for name, value in counts.items() if value}

    def _own_counters(self) -> dict[str, float]:
        """Return what the scheduler role has counted so far: its own, and what it has read from the shared cache."""
        reads = self._store.store_stats
        of_store = asdict(reads) if isinstance(reads, StoreReads) else {}
        return asdict(self._store.stats) | {f"{STORE_PREFIX}{name}": value for name, value in of_store.items()}

    def missing(self) -> list[str]:
        """Return what requests need next and what isn't in the workers' memory, each item once."""
        names: dict[str, None] = {}
        for tracked in self._requests.values():
            first = tracked.missing_item(is_ahead=tracked.request_id in self._ahead)
            if first is not None:
                names.update(
                    (item.identifier, None)
                    for _, item in tracked.between(first.offset, first.offset + self._reach.window_tokens)
                    if not item.has_pixels
                )
        return [name for name in names if not self._memory.holds(name)]

    def not_coming(self, missing: Iterable[str]) -> list[str]:
        """Return those of what is missing that the connector neither has nor is about to get. Any thread but the engine's."""
        return not_coming(self._store, missing)

    def lost(self, asker: str, published: Collection[str]) -> Future[list[str]]:
        """Return which of these embeddings requests need next that are missing and not coming, once some are.

        It has no names if the asker asks again or the engine ends before that.
        """
        told = self._losses.ask(asker, published)
        self._losses.note_missing(self.missing())
        return told

    def expect(self, told: EmbeddingPlaces) -> None:
        """Tell the connector where embeddings are or will be."""
        expect(self._store, told.places, told.stored)

    # ---- all requests wait ------------------------------------------------------------------------------------------

    def _wake(self, arrived: str = "", /) -> None:
        self._has_arrivals = True
        self.on_arrival()

    def begin_step(self) -> None:
        """Note that the engine looks at all requests from now on: what has arrived by now is no news after this step."""
        self._has_arrivals = False

    @property
    def num_waiting(self) -> int:
        """How many requests wait for an embedding."""
        return sum(tracked.waiting_since is not None for tracked in self._requests.values())

    def seconds_to_news(self) -> float:
        """Return after what time one of them has to be looked at, unless it is woken before: it may have waited too long."""
        if self._has_arrivals:
            return 0.0
        begun = [tracked.waiting_since for tracked in self._requests.values() if tracked.waiting_since is not None]
        return max(0.0, min(begun, default=self.clock()) + self._wait_seconds - self.clock())

    # ---- items ------------------------------------------------------------------------------------------------------

    @property
    def _memory(self) -> EncoderMemory:
        assert self._attached is not None, "vLLM has made its scheduler without chiasm's encoder cache manager"
        return self._attached

    def _state(self, identifier: str) -> ItemState:
        return self._items.setdefault(identifier, ItemState())

    def _content(self, identifier: str) -> Content:
        state = self._items.get(identifier)
        return Content.EMBEDDING if state is None else state.content

    def _is_available(self, tracked: TrackedRequest, item: Item) -> bool:
        """Return whether the item is in memory, can be encoded here, or has arrived; only the last is a promise."""
        identifier = item.identifier
        if self._memory.holds(identifier):
            content = self._content(identifier)
            if content is Content.EMBEDDING and self._is_producer and not self.is_published(identifier):
                self._state(identifier).is_republished = True
            return content is not Content.ZEROS  # zeros go when the requests that use them have failed
        if item.has_pixels or self._is_promised(item):
            return True
        if self._state(identifier).promised is not None:  # to another request
            return False
        misfit = self._misfit(item)
        if self._state(identifier).has_failed:
            self._fail(tracked, f"The EC connector failed on item {identifier}.")
        elif misfit is None:
            return False
        elif identifier in tracked.rejected:
            self._fail(tracked, f"Item {identifier} does not fit: {misfit}.")
        else:  # it may be the entry that is wrong, and the next one right
            tracked.rejected.add(identifier)
            with logged(self._store, f"discard the embedding of item {identifier}"):
                self._store.discard(identifier, misfit)
        return False

    def _is_promised(self, item: Item) -> bool:
        """Return whether the connector has the entry. On a reader it then stays loadable until the step's end."""
        state = self._state(item.identifier)
        if state.promised is None:
            if not self._ask(self._store.has_cache_item, item):
                return False
            known = self._ask(self._store.layout_of, item)
            if state.has_failed or (known is not None and self._layout.misfit(*known, item.rows) is not None):
                return False
            state.promised = (item.rows, self._layout.width if known is None else known[0][1])
        return state.promised[0] == item.rows

    def _misfit(self, item: Item) -> str | None:
        """Return why an entry that is here doesn't fit the item; None if it does, or if nothing is known of it."""
        known = self._ask(self._store.layout_of, item)
        return None if known is None else self._layout.misfit(*known, item.rows)

    def _ask(self, question: Callable[[str], _AnswerT], item: Item) -> _AnswerT | None:
        """Ask the connector about an item. If it fails, it isn't asked about the item again in this step; None then."""
        state = self._state(item.identifier)
        if state.has_failed:
            return None
        try:
            return question(item.identifier)
        except Exception:
            log_failure(self._store, f"answer about item {item.identifier}")
            state.has_failed = True
            return None

    # ---- requests ---------------------------------------------------------------------------------------------------

    def _tracked(self, request: Any) -> TrackedRequest:
        tracked = self._requests.get(request.request_id)
        if tracked is not None and len(tracked.items) == len(request.mm_features):
            return tracked
        if tracked is not None:  # a session to which the client has added items
            self._forget(tracked)
        tracked = self._requests[request.request_id] = TrackedRequest.of(request, self._metadata_fields)
        tracked.refusal = tracked.refusal or self._too_large(tracked)
        if tracked.refusal is not None:
            self._fail(tracked, tracked.refusal)
        return tracked

    def _too_large(self, tracked: TrackedRequest) -> str | None:
        """Return why an embedding that the request wants can never be brought in; None if all can.

        The middleware refuses most of them before. What is left may be audio, whose rows have no levels.
        """
        try:
            for item in tracked.wanted.items:
                check_received_size(self._layout.num_bytes(item.rows, has_levels=False), self._max_received_bytes)
        except InvalidRequestError as error:
            return error.message
        return None

    def _forget(self, tracked: TrackedRequest) -> None:
        self._end_wait(tracked)
        if self._is_reader and not tracked.is_new:
            with logged(self._store, "let go of what a request wanted"):
                self._store.request_finished(tracked.wanted)

    def _has_told(self, tracked: TrackedRequest, num_computed_tokens: int) -> bool:
        """Tell the connector what a request wants. Return False if the connector fails, and the request with it."""
        with logged(self._store, "note what a request wants, so the request fails"):
            self._store.ensure_cache_available(tracked.wanted, num_computed_tokens)
            return True
        self._fail(tracked, "The EC connector failed to note what it wants.")
        return False

    def _may_run_ahead(self, tracked: TrackedRequest, tokens: int, begins: bool) -> bool:
        """Return whether the request computes the ``tokens`` before an item that is missing."""
        reach = self._reach
        if tokens <= reach.lookahead_tokens or reach.max_ahead == 0:
            return False
        has_place = tracked.request_id in self._ahead or len(self._ahead) < reach.max_ahead
        return not begins or (tokens >= reach.min_tokens and has_place)

    def _defer(self, tracked: TrackedRequest, index: int) -> None:
        now, tracked.missing = self.clock(), tracked.items[index].identifier
        self.waits.begin(tracked.request_id, index, now)
        if tracked.waiting_since is None:
            tracked.waiting_since = now
            self._count("waits")

    def _end_wait(self, tracked: TrackedRequest) -> None:
        if tracked.waiting_since is not None:
            now = self.clock()
            self.waits.end(tracked.request_id, now)
            self._count("wait_seconds", now - tracked.waiting_since)
            tracked.waiting_since = None

    def _fail(self, tracked: TrackedRequest, reason: str) -> None:
        if tracked.request_id in self._failed:
            return
        self._end_wait(tracked)
        self._failed.add(tracked.request_id)
        self._count("failed_requests")
        _logger.warning("Request %s fails. %s", tracked.request_id, reason)

    def _count(self, name: str, value: float = 1) -> None:
        self._counts[name] = self._counts.get(name, 0) + value
