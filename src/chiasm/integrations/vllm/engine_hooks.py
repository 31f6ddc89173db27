"""Where the connector takes part in decisions of vLLM's engine that the interface of EC connectors doesn't cover.

- *Is there room for an item?* vLLM asks its encoder cache manager right before it decides to load or to encode an item; a
  refusal makes prefill stop before the item. So prefill gets as far as there are embeddings, and nothing is decided for an
  embedding that has disappeared in the meantime.
- *What to do while every request waits for an embedding?* By itself vLLM runs one round per millisecond, through scheduler,
  workers and statistics, which takes most of a core. Here it sleeps until the connector says that an embedding has arrived or
  was lost, or a client sends something.
- *What does vLLM's HTTP server say?* The middleware, which runs in another process, asks which embeddings are awaited or lost,
  how they are exchanged and which others have yet to fetch, and says where they are, by vLLM's way of calling a method of the
  engine by its name.
- *How long has a request waited for embeddings?* The connector can add that to a request's last output. A stream is told with
  the first, so it is added to what the scheduler hands out.
"""

from __future__ import annotations

import functools
import logging
import queue
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from weakref import WeakValueDictionary

import msgspec
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
from vllm.v1.engine.core import EngineCore, EngineCoreProc

from chiasm.errors import ConfigurationError
from chiasm.integrations.vllm.messages import (
    AWAITED_METHOD,
    EXPECT_METHOD,
    LOST_METHOD,
    MISSING_METHOD,
    PLACE_METHOD,
    UNFETCHED_METHOD,
    WAITS_METHOD,
    Exchange,
)
from chiasm.integrations.vllm.scheduler import SchedulerHalf
from chiasm.integrations.vllm.work import tell_with_outputs
from chiasm.wire import EmbeddingPlaces

_logger = logging.getLogger(__name__)
_MAX_WAIT_SECONDS = 0.1
"""Time after which vLLM runs one round, since its watchdog needs a sign of life."""

_halves: WeakValueDictionary[str, SchedulerHalf] = WeakValueDictionary()
"""The halves by vLLM's id of their engine, for its encoder cache manager, which is made after the connector."""


def install(vllm_config: Any, half: SchedulerHalf) -> None:
    """Take part in the engine whose scheduler is being made. Raises ConfigurationError."""
    config, name = vllm_config.ec_manager_config, f"{__name__}.{ChiasmEncoderCacheManager.__name__}"
    if config.encoder_cache_manager_cls not in (None, name):
        raise ConfigurationError("ChiasmECConnector brings its own encoder cache manager; remove --ec-manager-config.")
    config.encoder_cache_manager_cls = name
    _halves[vllm_config.ec_transfer_config.engine_id] = half
    _wait_between_steps()
    _tell_waits()
    for name, method in _METHODS.items():
        setattr(EngineCore, name, method)


# Methods of the engine, called between its steps.


def _missing(engine: Any) -> list[str]:
    """Return which embeddings requests need next that are not in memory."""
    half = _half_of(engine.scheduler)
    return half.missing() if half is not None else []


def _awaited(engine: Any) -> Future[list[str]]:
    """Return those of them that are not coming either. The connector is asked while the engine goes on."""
    half, missing = _half_of(engine.scheduler), _missing(engine)
    return _asking().submit(lambda: half.not_coming(missing) if half is not None else [])


def _lost(engine: Any, asker: str, published: str) -> Future[list[str]]:
    """Return which of these embeddings are lost, once some are, given the JSON of their names."""
    half, names = _half_of(engine.scheduler), msgspec.json.decode(published, type=list[str])
    if half is not None:
        return half.lost(asker, names)
    told: Future[list[str]] = Future()
    told.set_result([])
    return told


def _expect(engine: Any, told: str) -> None:
    """Note where embeddings are, given the JSON of EmbeddingPlaces, which the middleware has checked."""
    half = _half_of(engine.scheduler)
    if half is not None:
        half.expect(msgspec.json.decode(told, type=EmbeddingPlaces))


def _exchange(engine: Any) -> str:
    """Return the JSON of how embeddings are exchanged."""
    connector = engine.scheduler.get_ec_connector()
    exchange = connector.exchange() if _half_of(engine.scheduler) is not None else Exchange()
    return msgspec.json.encode(exchange).decode()


def _unfetched(engine: Any) -> int:
    """Return how many embeddings others have yet to fetch."""
    return int(engine.scheduler.get_ec_connector().num_unfetched()) if _half_of(engine.scheduler) is not None else 0


def _want_waits(engine: Any) -> None:
    """Tell with the outputs how long requests have waited."""
    half = _half_of(engine.scheduler)
    if half is not None:
        half.waits.are_wanted = True


_METHODS: dict[str, Callable[..., Any]] = {
    AWAITED_METHOD: _awaited,
    LOST_METHOD: _lost,
    MISSING_METHOD: _missing,
    EXPECT_METHOD: _expect,
    PLACE_METHOD: _exchange,
    UNFETCHED_METHOD: _unfetched,
    WAITS_METHOD: _want_waits,
}


@functools.cache
def _asking() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "chiasm-awaited")


def _half_of(scheduler: Any) -> SchedulerHalf | None:
    half = getattr(scheduler.get_ec_connector(), "scheduler_half", None)
    return half if isinstance(half, SchedulerHalf) else None


class ChiasmEncoderCacheManager(EncoderCacheManager):  # type: ignore[misc]
    """Has room for an item only if the connector lets prefill reach it."""

    def __init__(self, cache_size: int, half: SchedulerHalf) -> None:
        super().__init__(cache_size)
        self._half = half
        half.attach(self)

    @classmethod
    def create_manager(cls, *, cache_size: int, vllm_config: Any) -> ChiasmEncoderCacheManager:
        return cls(cache_size, _halves[vllm_config.ec_transfer_config.engine_id])

    def can_allocate(
        self, request: Any, input_id: int, encoder_compute_budget: int, num_embeds_to_schedule: int
    ) -> bool:
        half, request_id = self._half, request.request_id
        if half.is_out_of_reach(request_id, input_id):
            return False
        has_room = super().can_allocate(request, input_id, encoder_compute_budget, num_embeds_to_schedule)
        return has_room and half.can_get(request_id, input_id)

    def free_encoder_input(self, request: Any, input_id: int) -> None:
        super().free_encoder_input(request, input_id)
        self._half.released(request.mm_features[input_id].identifier)

    def holds(self, identifier: str) -> bool:
        return identifier in self.cached

    def forget(self, identifier: str) -> bool:
        rows = self.freeable.pop(identifier, None)
        if rows is None:
            return identifier not in self.cached
        del self.cached[identifier]
        del self.num_embeds_by_hash[identifier]
        self.freed.append(identifier)
        self.num_free_slots += rows
        return True


@functools.cache
def _wait_between_steps() -> None:
    """Make the engine of this process wait as described above, before it has run a step."""
    step = getattr(EngineCoreProc, "_process_engine_step", None)
    if step is None:
        _logger.warning(
            "vLLM's engine keeps a core busy while requests wait for embeddings: it has no EngineCoreProc._process_engine_step."
        )
        return

    @functools.wraps(step)
    def patient(engine: Any) -> Any:
        half = _half_of(engine.scheduler)
        if half is not None:
            half.begin_step()
        executed = step(engine)
        # Engines in lockstep wait for each other's steps.
        if half is not None and not executed and type(engine) is EngineCoreProc:
            _wait(engine, half)
        return executed

    EngineCoreProc._process_engine_step = patient


@functools.cache
def _tell_waits() -> None:
    """Have the schedulers of this process hand out waits with outputs."""

    def tell(scheduler: Any, outputs: Iterable[Any]) -> None:
        half = _half_of(scheduler)
        if half is not None:
            half.waits.tell(outputs)

    tell_with_outputs(tell)


def _wait(engine: Any, half: SchedulerHalf) -> None:
    """Return when an embedding or a message has come, or if some request doesn't wait for an embedding."""
    scheduler = engine.scheduler
    if engine.batch_queue or scheduler.has_finished_requests():
        return
    num_waiting = half.num_waiting
    if num_waiting == 0 or num_waiting != sum(scheduler.get_request_counts()):
        return
    inbox: queue.Queue[Any] = engine.input_queue

    def notify() -> None:
        with inbox.not_empty:
            inbox.not_empty.notify_all()

    half.on_arrival = notify
    with inbox.not_empty:
        seconds = min(half.seconds_to_news(), _MAX_WAIT_SECONDS)
        if not inbox.queue and seconds > 0:
            inbox.not_empty.wait(seconds)
