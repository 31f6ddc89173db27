"""Images to encoders: each encoded once at a time, and again elsewhere if an encoder fails.

A *flight* is the encoding of one image, whichever request asked for it: requests that need the same image meanwhile wait for
the one flight. It waits in the queue of :mod:`chiasm.proxy.encode_queue`, which says when it goes to which encoder. A *call* is
one HTTP request to one encoder and carries flights that one request began. A flight for which nobody waits any more is
abandoned, and a call is cancelled with its last flight.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence

import msgspec

from chiasm.errors import ChiasmError, Code, DeadlineExceededError, EmbeddingUnavailableError, OverloadedError
from chiasm.http.timing import TimingEntry, duration_of, read_timing
from chiasm.proxy.encode_plan import Entry
from chiasm.proxy.encode_queue import EncodeQueue
from chiasm.proxy.fleet import Fleet, Instance
from chiasm.proxy.job import Job
from chiasm.proxy.media import Item
from chiasm.proxy.metrics import Metrics
from chiasm.proxy.places import Places
from chiasm.proxy.probe import Prober
from chiasm.proxy.prompts import ItemWork
from chiasm.proxy.upstream import RefusedError, Upstream, UpstreamError, UpstreamResponse
from chiasm.proxy.waiting import Comeback, none_healthy
from chiasm.wire import CHAT_PATH, UNREADABLE, ECItem, ECPlace, InstanceState, Role

_MAX_RESPONSE_BYTES = 8 << 20
_BEFORE_DEADLINE_SECONDS = 0.1
"""A request whose images wait for room gives up so long before its deadline, to say what it has waited for."""
_TRY_ELSEWHERE = frozenset({408, 425, 429})
"""Statuses below 500 for which the encoder is to blame, not the image."""


class _Body(msgspec.Struct):
    """The part of an encoder's response that matters here."""

    ec_transfer_params: dict[str, ECItem] | None = None


_body = msgspec.json.Decoder(_Body)


class _Flight:
    def __init__(self, item: Item, entry: Entry) -> None:
        self.item = item
        self.entry = entry
        """Its place in the queue."""
        self.waiters: set[Job] = set()
        self.metadata: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        # Marks a failure as seen, also if all waiters have left before it.
        self.metadata.add_done_callback(lambda future: future.cancelled() or future.exception())
        self.encode_seconds: float | None = None
        """The time that the encoder itself reports for its call."""
        self.published_at = 0.0
        """On the clock of ``time.monotonic``."""
        self.call: _Call | None = None
        self.attempts = 0
        self.has_met_full = False
        """Whether an encoder has refused it for want of room."""
        self.stranded_since: float | None = None
        """Since when no healthy encoder may get it."""
        self.refusal: RefusedError | None = None
        """With what the last encoder that failed has answered, if it has."""


class _Call:
    def __init__(self, instance: Instance, flights: list[_Flight]) -> None:
        self.instance = instance
        self.flights = flights
        self.task: asyncio.Task[None] | None = None


class Encoders:
    """All flights of the proxy. Made and used on one event loop."""

    def __init__(
        self,
        fleet: Fleet,
        upstream: Upstream,
        prober: Prober,
        metrics: Metrics,
        queue: EncodeQueue,
        places: Places,
        comeback: Comeback,
        *,
        timeout_seconds: float,
        max_attempts: int,
        comeback_seconds: float,
    ) -> None:
        self._fleet = fleet
        self._upstream = upstream
        self._prober = prober
        self._metrics = metrics
        self._queue = queue
        self._places = places
        self._timeout_seconds = timeout_seconds
        self._max_attempts = max_attempts
        self._comeback = comeback
        self._comeback_seconds = comeback_seconds
        fleet.listeners.append(self._note_change)
        self._flights: dict[str, _Flight] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._waking: asyncio.TimerHandle | None = None

    async def close(self) -> None:
        if self._waking is not None:
            self._waking.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def encode(self, items: Iterable[Item], job: Job) -> dict[str, bytes]:
        """Have images encoded; return the encoders' metadata (JSON) by identifier when all embeddings are published.

        Cancelling it abandons the images that only this request needs. Raises OverloadedError or EmbeddingUnavailableError if
        no encoder is left or has room, DeadlineExceededError, and RefusedError with the response of an encoder that refused
        an image.
        """
        started = time.monotonic()
        flights = await self._fly(items, job)
        job.timing.encode_call = time.monotonic() - started
        known = (flight.encode_seconds for flight in flights.values())
        job.timing.encode = max((seconds for seconds in known if seconds is not None), default=None)
        self._metrics.encode.observe(job.timing.encode_call)
        return {name: flight.metadata.result() for name, flight in flights.items()}

    async def encode_again(self, items: Iterable[Item], job: Job) -> None:
        """Have images encoded whose embeddings were published and are lost. Raises like :meth:`encode`."""
        items = list(items)
        for item in items:
            self._queue.note_lost(item.identifier)
        await self._fly(items, job)

    async def _fly(self, items: Iterable[Item], job: Job) -> dict[str, _Flight]:
        """Return the flights of these images when all have ended well."""
        flights: dict[str, _Flight] = {}
        for item in items:
            if item.identifier in flights:
                continue
            flight = self._flights.get(item.identifier)
            if flight is None:
                entry = Entry(
                    ItemWork(item.identifier, item.pixels),
                    job.due,
                    request=job,
                    language=job.instance,
                    size_bytes=item.part_bytes,
                )
                flight = self._flights[item.identifier] = _Flight(item, entry)
                self._queue.add(entry)
            else:
                self._metrics.items.labels("joined").inc()
                self._queue.hasten(flight.entry, job.due)
            flight.waiters.add(job)
            flights[item.identifier] = flight
            if flight.call is not None:
                self._tell(flight.call.instance, [flight], {job})
        try:
            self._feed()
            results = [flight.metadata for flight in flights.values()]
            seconds = max(0.0, job.exchange.seconds_left - _BEFORE_DEADLINE_SECONDS)
            done, waiting = await asyncio.wait(results, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
            for result in done:
                if error := result.exception():
                    raise error
            if waiting:
                raise self._too_late(flights.values())
        finally:
            for flight in flights.values():
                self._leave(flight, job)
            self._feed()
        job.published_at = {**job.published_at, **{name: flight.published_at for name, flight in flights.items()}}
        return flights

    def _too_late(self, flights: Iterable[_Flight]) -> ChiasmError:
        """Return the error for a request whose deadline passes before these images are encoded."""
        if all((flight.call and not flight.has_met_full) or flight.metadata.done() for flight in flights):
            return DeadlineExceededError(
                "The deadline of the request passed before its images were encoded.", code=Code.DEADLINE_EXCEEDED
            )
        if not self._fleet.healthy(Role.ENCODER):
            return none_healthy(Role.ENCODER)
        return OverloadedError(
            "The encoders had no room for the images until the request's deadline; try again later.",
            code=Code.TOO_MANY_REQUESTS,
        )

    def _feed(self) -> None:
        """Start the calls that are due now, and fail what no encoder is left for."""
        now = time.monotonic()
        for feed in self._queue.feed(now):
            self._start(feed.encoder, [self._flights[entry.item.identifier] for entry in feed.entries])
        stranded = self._queue.stranded()
        is_expected = bool(stranded) and self._comeback.expects(Role.ENCODER)
        for entry in stranded:
            flight = self._flights[entry.item.identifier]
            flight.stranded_since = flight.stranded_since or now
            if not is_expected or self._can_be_encoded_elsewhere(flight):
                self._settle(flight, _none_left(flight))
            elif now - flight.stranded_since >= self._comeback_seconds:
                self._settle(flight, _none_left(flight, self._comeback_seconds))
        self._metrics.items_waiting.set(len(self._queue))
        if self._waking is not None:
            self._waking.cancel()
            self._waking = None
        if wakes_at := self._queue.wakes_at(now):
            self._waking = asyncio.get_running_loop().call_later(wakes_at - now, self._feed)

    def _can_be_encoded_elsewhere(self, flight: _Flight) -> bool:
        """Whether all that wait for it can be answered by an instance that encodes itself."""
        return bool(self._fleet.healthy(Role.AGGREGATED)) and all(
            job.original is not None and not job.exchange.has_begun for job in flight.waiters
        )

    def _start(self, instance: Instance, flights: list[_Flight]) -> None:
        call = _Call(instance, flights)
        for flight in flights:
            flight.call = call
            flight.attempts += 1
            flight.stranded_since = None
        self._tell(instance, flights, set().union(*(flight.waiters for flight in flights)))
        call.task = asyncio.create_task(self._run(call))
        self._tasks.add(call.task)
        call.task.add_done_callback(self._tasks.discard)
        call.task.add_done_callback(lambda task: call.flights.clear())

    def _tell(self, encoder: Instance, flights: Sequence[_Flight], jobs: set[Job]) -> None:
        """Tell the language instances of these jobs that this encoder has these images, or will have them."""
        place = encoder.ec_place
        if place is None:
            return
        told: dict[Instance, dict[str, ECPlace]] = {}
        for flight in flights:
            for job in flight.waiters & jobs:
                job.places[flight.item.identifier] = place
                if job.instance is not None:
                    told.setdefault(job.instance, {})[flight.item.identifier] = place
        for instance, places in told.items():
            self._places.tell(instance, places)

    async def _run(self, call: _Call) -> None:
        try:
            await self._call(call)
        finally:
            self._queue.release([flight.entry for flight in call.flights], time.monotonic())
            self._feed()

    async def _call(self, call: _Call) -> None:
        instance = call.instance
        try:
            with self._fleet.working(instance, sum(flight.entry.seconds for flight in call.flights)):
                async with asyncio.timeout(self._timeout_seconds):
                    response = await self._post(call)
        except UpstreamError as error:
            is_healthy = await self._prober.lost(instance, error)
            for flight in call.flights:
                if not is_healthy or self._has_another(flight, instance):
                    flight.entry.failed_at.add(instance)
            self._again(call.flights, error)
            return
        except TimeoutError:
            self._exclude(call.flights, instance)
            self._again(call.flights, UpstreamError(f"An encoder took longer than {self._timeout_seconds:g} s."))
            return
        if response.status == 200:
            self._accept(call, response)
            return
        refusal = RefusedError(response)
        if refusal.is_leaving:  # if no other is left, its images wait only when it is known to be unhealthy
            await self._prober.lost(instance, refusal)
        self._refuse(call, refusal)

    async def _post(self, call: _Call) -> UpstreamResponse:
        # The waiting request with the latest deadline lends the call its headers.
        waiters = (job for flight in call.flights for job in flight.waiters)
        job = max(waiters, key=lambda waiter: waiter.exchange.deadline)
        body = _request_body(call, job)
        with await self._upstream.post(call.instance.url, CHAT_PATH, body, job.headers_for_encoder()) as response:
            return await response.read(_MAX_RESPONSE_BYTES)

    def _accept(self, call: _Call, response: UpstreamResponse) -> None:
        try:
            published = _body.decode(response.body).ec_transfer_params or {}
        except UNREADABLE:
            published = {}
        now = time.monotonic()
        timing = read_timing(response.headers.get("Server-Timing"))
        encode_seconds = duration_of(timing, "encode")
        done = [flight for flight in call.flights if flight.item.identifier in published]
        missing = [flight for flight in call.flights if flight.item.identifier not in published]
        self._queue.finish(
            [flight.entry for flight in done],
            now,
            seconds=_computed_seconds(timing) if not missing else None,
            found=_found(call, timing),
        )
        for flight in done:
            flight.encode_seconds, flight.published_at = encode_seconds, now
            self._settle(flight, bytes(published[flight.item.identifier].metadata))
        if missing:
            self._exclude(missing, call.instance)
            self._again(missing, UpstreamError("An encoder's answer doesn't name the image in ec_transfer_params."))

    def _refuse(self, call: _Call, error: RefusedError) -> None:
        if error.is_full:
            self._queue.note_full(call.instance, time.monotonic())
            self._metrics.encode_refusals.inc()
            for flight in call.flights:
                flight.attempts -= 1  # the encoder hasn't failed
                flight.has_met_full = True
                if flight.waiters:
                    self._requeue(flight)
            return
        if error.status >= 500 or error.status in _TRY_ELSEWHERE or error.status < 400:
            self._exclude(call.flights, call.instance)
            self._again(call.flights, error)
            return
        if len(call.flights) == 1:
            self._settle(call.flights[0], error)
            return
        # One of several images is bad. Requests that sent all of them get the error; images that others need go again alone.
        owners = set.intersection(*(flight.waiters for flight in call.flights))
        for flight in call.flights:
            if flight.waiters <= owners:
                self._settle(flight, error)
            else:
                self._requeue(flight, alone=True)

    def _note_change(self, instance: Instance) -> None:
        """Give images that have failed at an encoder that comes back another chance there, and see what can start now."""
        if instance.role is not Role.ENCODER:
            return
        if instance.state is InstanceState.HEALTHY:
            for flight in self._flights.values():
                flight.entry.failed_at.discard(instance)
        if self._flights:
            asyncio.get_running_loop().call_soon(self._feed)

    def _has_another(self, flight: _Flight, encoder: Instance) -> bool:
        """Whether a healthy encoder besides this one may get an image."""
        return any(
            one is not encoder and one not in flight.entry.failed_at for one in self._fleet.healthy(Role.ENCODER)
        )

    def _exclude(self, flights: Sequence[_Flight], instance: Instance) -> None:
        for flight in flights:
            flight.entry.failed_at.add(instance)

    def _again(self, flights: Sequence[_Flight], error: Exception) -> None:
        for flight in flights:
            flight.refusal = error if isinstance(error, RefusedError) else None
            if not flight.waiters:
                continue
            if flight.attempts >= self._max_attempts:
                self._settle(flight, _none_left(flight))
            else:
                self._metrics.encode_retries.inc()
                self._requeue(flight)

    def _requeue(self, flight: _Flight, *, alone: bool = False) -> None:
        """Let a flight wait again; ``alone`` for one that must not share a call."""
        if alone:
            flight.entry.request = flight
        flight.call = None
        self._queue.release([flight.entry], time.monotonic())
        self._queue.add(flight.entry)

    def _settle(self, flight: _Flight, outcome: bytes | Exception) -> None:
        self._forget(flight)
        self._queue.discard(flight.entry, time.monotonic())
        flight.call = None  # breaks a cycle that would keep the image's bytes until a garbage collection
        if flight.metadata.done():
            return
        if isinstance(outcome, bytes):
            self._metrics.items.labels("encoded").inc()
            flight.metadata.set_result(outcome)
        else:
            self._metrics.items.labels("failed").inc()
            flight.metadata.set_exception(outcome)

    def _forget(self, flight: _Flight) -> None:
        if self._flights.get(flight.item.identifier) is flight:
            del self._flights[flight.item.identifier]

    def _leave(self, flight: _Flight, job: Job) -> None:
        flight.waiters.discard(job)
        if flight.waiters or flight.metadata.done():
            return
        self._forget(flight)
        flight.metadata.cancel()
        call, flight.call = flight.call, None
        if call is None:
            self._queue.discard(flight.entry, time.monotonic())
        elif call.task is not None and not any(one.waiters for one in call.flights):
            call.task.cancel()


def _none_left(flight: _Flight, waited_seconds: float = 0.0) -> Exception:
    if flight.refusal is not None:
        return flight.refusal  # it says why
    if not flight.attempts:
        return none_healthy(Role.ENCODER, waited_seconds)
    attempts = "one attempt" if flight.attempts == 1 else f"{flight.attempts} attempts"
    which = f"no encoder came back within {waited_seconds:g} s" if waited_seconds else "no other encoder is left"
    return EmbeddingUnavailableError(
        f"An image could not be encoded in {attempts}, and {which}; try again.",
        code=Code.ENCODER_LOST,
    )


def _computed_seconds(timing: Sequence[TimingEntry]) -> float | None:
    """Return what an encoder has computed for a call; None if it doesn't say."""
    seconds = [one.seconds for one in timing if one.name in {"preprocess", "encode"} and one.seconds is not None]
    return sum(seconds) if seconds else None


def _found(call: _Call, timing: Sequence[TimingEntry]) -> set[str] | None:
    """Return the identifiers of the images whose embeddings the encoder had already; None if it doesn't say."""
    outcomes = {one.name: one.description for one in timing if one.name.startswith("item")}
    names = [flight.item.identifier for flight in call.flights]
    return {name for index, name in enumerate(names) if outcomes.get(f"item{index}") == "hit"} if outcomes else None


def _request_body(call: _Call, job: Job) -> bytes:
    models, model = call.instance.models, job.request.model
    if models and model not in models:
        model = models[0]
    return b'{"model":%b,"messages":[{"role":"user","content":[%b]}],"max_tokens":1,"stream":false}' % (
        msgspec.json.encode(model),
        b",".join([flight.item.image_url_part() for flight in call.flights]),
    )
