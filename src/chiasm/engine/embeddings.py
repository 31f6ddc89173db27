"""The embeddings in an engine's memory: how they get there, and what each item of a request cost.

This is the layer between the engine, which knows requests and sequences, and its EC connector, which knows neither.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from chiasm.connectors.faults import log_failure, logged
from chiasm.ec_transfer import ECConnector
from chiasm.ec_transfer.faults import connector_error, expect, not_coming
from chiasm.ec_transfer.losses import LossWatch
from chiasm.ec_transfer.size_check import check_received_size
from chiasm.engine.asking import Asking
from chiasm.engine.local_encoder import LocalEncoder
from chiasm.engine.request import ItemOutcome, ItemTiming
from chiasm.engine.request_state import RequestState
from chiasm.engine.scheduler import Scheduler
from chiasm.engine.sequence import Sequence
from chiasm.engine.step import Step
from chiasm.errors import ChiasmError, EmbeddingUnavailableError
from chiasm.models.base import PromptItem
from chiasm.wire import ECPlace

if TYPE_CHECKING:
    from chiasm.ec_transfer import ECConnectorStats
    from chiasm.ec_transfer.stores.reader import StoreReads
    from chiasm.ec_transfer.stores.writer import StoreWrites


RETRY_SECONDS = 0.01
"""Pause after an embedding was lost between the connector's yes and the step: it may be lost like that again and again."""


@contextmanager
def _noting_failure(connector: ECConnector, identifier: str, failed: dict[str, ChiasmError]) -> Iterator[None]:
    """A block that calls the connector about one item. If that raises an error, log it, and add the item to ``failed``."""
    try:
        yield
    except Exception as error:
        log_failure(connector, f"answer about item {identifier}, so the requests that want it fail")
        failed[identifier] = connector_error(error)


class Embeddings:
    """The adapter of the EC connector, both halves, and the tensors that the encoder cache manager accounts for.

    An aggregated engine has an encoder of its own instead of a connector; a decode engine has neither, since it computes no
    images. It looks for embeddings when one has arrived or when what is wanted has changed, and at no other time. All methods
    belong to the engine's thread, except where it says otherwise.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        entry_width: int,
        *,
        connectors: tuple[ECConnector, ECConnector] | None = None,
        encoder: LocalEncoder | None = None,
    ) -> None:
        """``connectors`` are the scheduler role and the worker role."""
        self.entries: dict[str, Tensor] = {}
        """``[rows, entry_width]`` by identifier."""
        self._entry_width = entry_width
        self.outcomes: Counter[ItemOutcome] = Counter()
        self.wait_seconds = 0.0
        self.images_encoded = 0
        self.encode_seconds = 0.0
        self._scheduler = scheduler
        self._scheduler_role = connectors[0] if connectors is not None else None
        self._worker_role = connectors[1] if connectors is not None else None
        self._max_received_bytes = connectors[0].max_received_bytes if connectors is not None else None
        self._encoder = encoder
        self.losses = LossWatch(self.not_coming)
        """Who waits to be told what is lost."""
        self._unasked: list[RequestState] = []
        """Requests that have come since the connector was last asked."""
        self._asking = Asking()
        self._has_lost = False
        self._changes_seen = -1
        self._changes_encoded = -1

    @property
    def stats(self) -> ECConnectorStats | None:
        """What both halves of the connector have counted. Any thread."""
        if self._scheduler_role is None or self._worker_role is None:
            return None
        return self._scheduler_role.stats + self._worker_role.stats

    @property
    def store_stats(self) -> StoreReads | StoreWrites | None:
        """The counters of the store beside the connector."""
        return self._scheduler_role.store_stats if self._scheduler_role is not None else None

    def stop(self) -> None:
        """Shut the connector down, or end the encoder."""
        self.losses.stop()
        if self._encoder is not None:
            self._encoder.stop()
        for connector in (self._scheduler_role, self._worker_role):
            if connector is not None:
                with logged(connector, "shut down"):
                    connector.shutdown()

    # ---- how a request gets its items ---------------------------------------------------------------------------------

    def check(self, items: Collection[PromptItem]) -> None:
        """Raise InvalidRequestError for an item whose embedding can never get into memory. Any thread."""
        self._scheduler.items.check(items)
        for item in items:
            check_received_size(self._scheduler.items.entry_bytes(item), self._max_received_bytes)

    def admit(self, state: RequestState) -> None:
        """Count the items that exist on admission as hits; the others count when they come, or when the request fails.

        The connector is asked for each of them when the next chunks of all requests are looked for, and after those, since it
        takes the order of asking as the order of need.
        """
        sequence = state.sequences[0]
        num_cached = self._scheduler.items.num_cached_tokens(sequence)
        stored = self._scheduler_role is not None and self._scheduler_role.ensure_cache_available(sequence, num_cached)
        for item in sequence.items:
            if any(timing.identifier == item.identifier for timing in state.timing.items):
                continue
            timing = ItemTiming(item.identifier, ItemOutcome.MISSED)
            state.timing.items.append(timing)
            if stored or item.offset + item.length <= num_cached or item.identifier in self.entries:
                timing.outcome = ItemOutcome.HIT
                self.outcomes[ItemOutcome.HIT] += 1
            else:
                state.missing[item.identifier] = timing
        if state.missing and self._scheduler_role is not None:
            self._unasked.append(state)

    def note(self, state: RequestState, identifier: str, outcome: ItemOutcome) -> None:
        """Count an item that was missing: it is there now, or never will be."""
        timing = state.missing.pop(identifier, None)
        if timing is not None:
            timing.outcome = outcome
            self.outcomes[outcome] += 1
            if outcome is not ItemOutcome.HIT:
                timing.wait_seconds = time.monotonic() - state.arrived
                self.wait_seconds += timing.wait_seconds

    def forget(self, state: RequestState) -> None:
        """Let go of what only a request wanted that has ended."""
        if self._scheduler_role is not None:
            with logged(self._scheduler_role, "let go of what a request wanted"):
                self._scheduler_role.request_finished(state.sequences[0])

    # ---- how entries get into memory ----------------------------------------------------------------------------------

    def update(self, states: Mapping[str, RequestState]) -> list[tuple[RequestState, ChiasmError]]:
        """Take those embeddings into memory that the next chunks want and that exist by now.

        Return the requests that need an item which cannot be encoded, or on which the connector has failed.
        """
        if not self._has_news:
            return []
        self._changes_seen, self._has_lost = self._scheduler.items.changes, False
        if self._scheduler_role is not None and self._worker_role is not None:
            if self._unasked:
                self._asking.ask_all()
            arrived = self._asking.begin(items[0].identifier for _, items in self._scheduler.wanted_items())
            if arrived is None or arrived:
                return self._load(self._scheduler_role, self._worker_role, arrived, states)
            return []
        self._asking.begin(())
        return [] if self._encoder is None else self._take_encoded(self._encoder, states)

    def look_again(self, arrived: str = "") -> None:
        """Note that an embedding has arrived, or without a name that any has arrived, was lost, or was made here."""
        if arrived:
            self._asking.note_arrival(arrived)
        else:
            self._asking.ask_all()

    @property
    def seconds_to_update(self) -> float | None:
        """After what time ``update`` should be called if nothing else happens; None if there is no reason to."""
        if not self._has_news:
            return None
        return RETRY_SECONDS if self._has_lost else 0.0

    @property
    def _has_news(self) -> bool:
        return self._asking.is_due or self._changes_seen != self._scheduler.items.changes

    def missing(self) -> list[str]:
        """Return the identifiers of what the next chunks want and what isn't in memory, each once."""
        if self._scheduler_role is None:
            return []
        wanted = {item.identifier: None for _, items in self._scheduler.wanted_items() for item in items}
        return [name for name in wanted if name not in self._scheduler.encoder_cache]

    def not_coming(self, missing: Iterable[str]) -> list[str]:
        """Return those of what is missing that the connector neither has nor is about to get. Any thread but the engine's."""
        return [] if self._scheduler_role is None else not_coming(self._scheduler_role, missing)

    def expect(self, places: Mapping[str, ECPlace], stored: Collection[str]) -> None:
        """Tell the connector where embeddings are or will be. Any thread."""
        if self._scheduler_role is not None:
            expect(self._scheduler_role, places, stored)

    def _load(
        self,
        scheduler_role: ECConnector,
        worker_role: ECConnector,
        arrived: Set[str] | None,
        states: Mapping[str, RequestState],
    ) -> list[tuple[RequestState, ChiasmError]]:
        """Have the connector hand over what has arrived, as far as there is room. If ``arrived`` is None, it is asked for all.

        Return the requests that want an item on which the connector has failed; it is not asked for that item again.
        """
        cache = self._scheduler.encoder_cache
        arrivals: list[tuple[Sequence, PromptItem]] = []
        failed: dict[str, ChiasmError] = {}
        requests: list[tuple[RequestState, ChiasmError]] = []
        for sequence, items in self._scheduler.wanted_items():
            first = items[0].identifier
            if arrived is not None and first not in arrived and first not in cache:
                continue
            for item in items:
                name = item.identifier
                if name not in cache and name not in failed:
                    with _noting_failure(scheduler_role, name, failed):
                        if not self._asks_for(scheduler_role, name, is_round=arrived is None):
                            break
                        if not self._scheduler.items.make_room(sequence, item):
                            if arrived is not None:
                                self._asking.ask_all()
                            break
                        scheduler_role.update_state_after_alloc(sequence, sequence.items.index(item))
                if name in failed:
                    self._scheduler.item_lost(name)
                    requests.append((states[sequence.request_id], failed[name]))
                    break
                self._scheduler.item_arrived(sequence, item)
                arrivals.append((sequence, item))
        requests += self._note_hits(scheduler_role, {item.identifier for _, item in arrivals}, failed, states)
        errors = self._hand_over(scheduler_role, worker_role, arrivals, states)
        for sequence, item in arrivals:
            state = states[sequence.request_id]
            if item.identifier in self.entries:
                self.note(state, item.identifier, ItemOutcome.WAITED)
                continue
            self._scheduler.item_lost(item.identifier)
            if item.identifier in errors:
                requests.append((state, errors[item.identifier]))
            else:
                self._has_lost = True
        return requests

    def _asks_for(self, scheduler_role: ECConnector, identifier: str, *, is_round: bool) -> bool:
        """Ask the connector whether it has an embedding: in a round once, otherwise with a round to follow if it hasn't."""
        if is_round and self._asking.is_absent(identifier):
            return False
        if scheduler_role.has_cache_item(identifier):
            self._asking.note_present(identifier)
            return True
        if is_round:
            self._asking.note_absent(identifier)
        else:
            self._asking.ask_all()  # what was asked for by itself counts as needed first
        return False

    def _hand_over(
        self,
        scheduler_role: ECConnector,
        worker_role: ECConnector,
        arrivals: list[tuple[Sequence, PromptItem]],
        states: Mapping[str, RequestState],
    ) -> Mapping[str, ChiasmError]:
        """Have the worker role put what was noted into ``entries``. Return on which items a role has failed, and how."""
        started = time.monotonic()
        failed: Mapping[str, ChiasmError] = {}
        try:
            metadata = scheduler_role.build_connector_meta()
            if not metadata.loads:
                return {}
            worker_role.bind_connector_metadata(metadata)
            try:
                failed = self._start_loads(worker_role, metadata.loads)
            finally:
                worker_role.clear_connector_metadata()
        except Exception as error:
            log_failure(scheduler_role, "hand over embeddings, so the requests that lack one fail")
            return {item.identifier: connector_error(error) for _, item in arrivals}
        for name in [name for name in metadata.loads if name not in self._scheduler.encoder_cache]:
            self.entries.pop(name, None)  # noted for a step that failed, whose room was given up
        seconds = time.monotonic() - started
        self._reject_misfits(worker_role, arrivals, states)
        for request_id in {sequence.request_id for sequence, _ in arrivals}:
            states[request_id].timing.transfer_seconds += seconds
        return failed

    def _start_loads(self, worker_role: ECConnector, names: tuple[str, ...]) -> Mapping[str, ChiasmError]:
        """Have the worker role hand these over: all at once or, if that fails, one by one. Return which fail by themselves.

        One embedding may need more memory than there is; it must not cost the requests that want others.
        """
        try:
            worker_role.start_load_caches(self.entries)
        except Exception:
            failed: dict[str, ChiasmError] = {}
            for name in [name for name in names if name not in self.entries]:
                # The role skips what is there already.
                alone = {other: torch.empty(0) for other in names if other != name}
                with _noting_failure(worker_role, name, failed):
                    worker_role.start_load_caches(alone)
                    if name in alone:
                        self.entries[name] = alone[name]
            if not failed:
                log_failure(worker_role, "hand over embeddings at once, and did so one by one")
            return failed
        return {}

    def _note_hits(
        self,
        scheduler_role: ECConnector,
        arrived: Set[str],
        failed: dict[str, ChiasmError],
        states: Mapping[str, RequestState],
    ) -> list[tuple[RequestState, ChiasmError]]:
        """Ask for what else the requests want that have just come, and count what is there.

        Return those that want an item on which the connector has failed, now or in this round before.
        """
        requests: list[tuple[RequestState, ChiasmError]] = []
        unasked, self._unasked = self._unasked, []
        for state in unasked:
            if states.get(state.request.request_id) is not state:
                continue
            for name in list(state.missing):
                is_here = name in arrived
                if not is_here and name not in failed:
                    with _noting_failure(scheduler_role, name, failed):
                        is_here = scheduler_role.has_cache_item(name)
                if name in failed:
                    requests.append((state, failed[name]))
                elif is_here:
                    self.note(state, name, ItemOutcome.HIT)
        return requests

    def _reject_misfits(
        self,
        worker_role: ECConnector,
        arrivals: list[tuple[Sequence, PromptItem]],
        states: Mapping[str, RequestState],
    ) -> None:
        """Remove what has another shape than a request needs, so that it is encoded again; the request waits meanwhile.

        If it comes back like that, the request itself is to blame, and fails in :meth:`unusable`.
        """
        loaded = [(sequence, item) for sequence, item in arrivals if item.identifier in self.entries]
        fitting = {item.identifier for _, item in loaded if self._fits(item, self.entries[item.identifier])}
        for sequence, item in loaded:
            name, rejected = item.identifier, states[sequence.request_id].rejected
            if name in fitting or name in rejected:
                continue
            rejected.add(name)
            entry = self.entries.pop(name, None)
            if entry is not None:
                shapes = f"its shape is {tuple(entry.shape)}, but a request needs {self._shape_of(item)}"
                with logged(worker_role, f"discard the embedding of item {name}"):
                    worker_role.discard(name, shapes)

    def _shape_of(self, item: PromptItem) -> tuple[int, int]:
        return len(item.geometry.rows), self._entry_width

    def _fits(self, item: PromptItem, entry: Tensor) -> bool:
        return tuple(entry.shape) == self._shape_of(item)

    def _take_encoded(
        self, encoder: LocalEncoder, states: Mapping[str, RequestState]
    ) -> list[tuple[RequestState, ChiasmError]]:
        """Take what the encoder has finished, as far as there is room."""
        failed: dict[str, Exception] = {}
        requests: list[tuple[RequestState, ChiasmError]] = []
        for sequence, items in self._scheduler.wanted_items():
            state = states[sequence.request_id]
            for item in items:
                name = item.identifier
                if name not in self._scheduler.encoder_cache and name not in failed:
                    if name not in encoder or not self._scheduler.items.make_room(sequence, item):
                        break
                    encoded = encoder.take(name)
                    if encoded is None:
                        self._scheduler.item_lost(name)
                        break
                    if encoded.error is None:
                        self.entries[name] = encoded.entry
                        self._note_encoded(state, name, encoded.seconds)
                    else:
                        self._scheduler.item_lost(name)
                        failed[name] = encoded.error
                if name in failed:
                    error = ChiasmError(f"The encoder failed on an image: {type(failed[name]).__name__}.")
                    requests.append((state, error))
                    break
                self._scheduler.item_arrived(sequence, item)
                self.note(state, name, ItemOutcome.WAITED)
        return requests

    def _note_encoded(self, state: RequestState, identifier: str, seconds: float) -> None:
        self.images_encoded += 1
        self.encode_seconds += seconds
        state.timing.encode_seconds += seconds
        timing = state.missing.get(identifier)
        if timing is not None:
            timing.encode_seconds = seconds
            self.note(state, identifier, ItemOutcome.ENCODED)

    def encode(self, states: Mapping[str, RequestState]) -> None:
        """Have the engine's own encoder make what is missing, and nothing else."""
        if self._encoder is not None and self._changes_encoded != self._scheduler.items.changes:
            self._changes_encoded = self._scheduler.items.changes
            self._encoder.want(
                {
                    item.identifier: states[sequence.request_id].request.pixels[item.identifier]
                    for sequence, item in self._scheduler.items_to_encode()
                }
            )

    def unusable(self, step: Step, states: Mapping[str, RequestState]) -> list[tuple[RequestState, ChiasmError]]:
        """Return the requests in the step with an entry of another shape than they expect, or one lost since planning."""
        failed: list[tuple[RequestState, ChiasmError]] = []
        for part in step.prefills:
            for item in part.sequence.items_between(part.start, part.end):
                entry = self.entries.get(item.identifier)
                if entry is None or not self._fits(item, entry):
                    found = "is gone" if entry is None else f"has the shape {tuple(entry.shape)}"
                    error = EmbeddingUnavailableError(
                        f"The embedding of item {item.identifier[:12]}… {found}, but the request needs the shape "
                        f"{self._shape_of(item)}. Check that encoder and prefill serve the same model, and that the image size "
                        "sent is right."
                    )
                    failed.append((states[part.sequence.request_id], error))
                    break
        return failed

    # ---- how entries leave it -----------------------------------------------------------------------------------------

    def drop_evicted(self) -> None:
        """Free the tensors that the manager has evicted."""
        for identifier in self._scheduler.encoder_cache.take_evicted():
            self.entries.pop(identifier, None)

    def forget_unfilled(self) -> None:
        """Give up room that was taken for entries that never came, and free the tensors that were evicted for them."""
        for identifier in self._scheduler.encoder_cache.identifiers - self.entries.keys():
            self._scheduler.item_lost(identifier)
        self.drop_evicted()
