"""Images to encoders: each encoded once at a time, and again elsewhere if an encoder fails or is late.

A *flight* is the encoding of one image, whichever request asked for it: requests that need the same image meanwhile wait for
the one flight, unless an encoder might take the API key of one and refuse that of another. It waits in the queue of
:mod:`chiasm.proxy.encode_queue`, which says when it goes to which encoder. A *call* is one HTTP request to one encoder and
carries flights that one request began. A flight for which nobody waits any more is abandoned, and a call is cancelled with its
last flight. If that is because the answer is whole, the encoder has most likely published the embedding and answers in a
moment, so its call may end: what it says is counted and learned from.

A late call may be *hedged*: a second encoder gets its flights too, in a call of its own. The first answer counts, and the other
call is cancelled. Language instances are told the second encoder's place when it has answered, or when it is the only one left:
until then they wait at the first, which may still deliver.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import msgspec

from chiasm.errors import ChiasmError, Code, DeadlineExceededError, OverloadedError
from chiasm.http.json_size import INLINE_BYTES
from chiasm.http.log_format import request_id
from chiasm.http.timing import TimingEntry, duration_of
from chiasm.proxy.encode_plan import Entry
from chiasm.proxy.encode_queue import EncodeQueue
from chiasm.proxy.encoder_demand import EncoderDemand
from chiasm.proxy.fleet import Fleet
from chiasm.proxy.flights import Call, Flight, none_left
from chiasm.proxy.instance import Instance
from chiasm.proxy.job import Job
from chiasm.proxy.media import Item
from chiasm.proxy.metrics import Metrics
from chiasm.proxy.places import Places
from chiasm.proxy.probe import Prober
from chiasm.proxy.prompts import ItemWork
from chiasm.proxy.records.trail import EncodedAt, EncoderCall
from chiasm.proxy.upstream import RefusedError, Upstream, UpstreamError, UpstreamResponse
from chiasm.proxy.waiting import Comeback, none_healthy
from chiasm.tasks import Tasks
from chiasm.wire import CHAT_PATH, UNREADABLE, ECItem, ECPlace, InstanceState, Role

_log = logging.getLogger(__name__)
_MAX_RESPONSE_BYTES = 8 << 20
_AFTER_ANSWER_SECONDS = 1.0
"""How long a call goes on when the answer is whole: a language instance may have read an embedding and answered before the
encoder has told the proxy of it."""
_TRY_ELSEWHERE = frozenset({408, 425, 429})
"""Statuses below 500 for which the encoder is to blame, not the image."""


class _Body(msgspec.Struct):
    """The part of an encoder's response that matters here."""

    ec_transfer_params: dict[str, ECItem] | None = None


_body = msgspec.json.Decoder(_Body)


class Encoders:
    """All flights of the proxy. Made and used on one event loop."""

    def __init__(
        self,
        fleet: Fleet,
        upstream: Upstream,
        prober: Prober,
        metrics: Metrics,
        queue: EncodeQueue,
        demand: EncoderDemand,
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
        self._demand = demand
        self._places = places
        self._timeout_seconds = timeout_seconds
        self._max_attempts = max_attempts
        self._comeback = comeback
        self._comeback_seconds = comeback_seconds
        fleet.listeners.append(self._note_change)
        self._flights: dict[tuple[str, str], Flight] = {}
        """By identifier, and by whose requests share them."""
        self._stranded_since: dict[Flight, float] = {}
        """Those that no healthy encoder may get now, and since when that has been so."""
        self._tasks = Tasks()
        self._waking: asyncio.TimerHandle | None = None

    async def close(self) -> None:
        if self._waking is not None:
            self._waking.cancel()
        await self._tasks.close()

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

    async def encode_again(
        self, items: Iterable[Item], job: Job, lost_at: Mapping[str, Sequence[ECPlace]] = MappingProxyType({})
    ) -> None:
        """Have images encoded whose embeddings were published and are lost. Raises like :meth:`encode`.

        ``lost_at`` are places, by identifier, from which the language instance hasn't got an embedding: another encoder gets
        the image, if there is one.
        """
        items = list(items)
        for item in items:
            self._queue.note_lost(item.identifier)
        await self._fly(items, job, lost_at)

    async def _fly(
        self, items: Iterable[Item], job: Job, lost_at: Mapping[str, Sequence[ECPlace]] = MappingProxyType({})
    ) -> dict[str, Flight]:
        """Return the flights of these images when all have ended well."""
        flights: dict[str, Flight] = {}
        asked_at = time.monotonic()
        for item in items:
            if item.identifier in flights:
                continue
            flight = self._flights.get((item.identifier, job.sharers))
            if flight is None:
                entry = Entry(
                    ItemWork(item.identifier, item.pixels),
                    job.due,
                    request=job,
                    sharers=job.sharers,
                    language=job.instance,
                    size_bytes=item.part_bytes,
                )
                entry.failed_at |= self._to_avoid(lost_at.get(item.identifier, ()))
                flight = self._flights[item.identifier, job.sharers] = Flight(item, entry)
                self._queue.add(entry)
                self._demand.note(self._queue.cost(entry.item, asked_at), asked_at)
            else:
                self._metrics.items.labels("joined").inc()
                self._queue.hasten(flight.entry, job.due)
            flight.waiters.add(job)
            flights[item.identifier] = flight
            if flight.calls:
                self._tell(flight.calls[0].instance, [flight], {job})
        try:
            self._feed()
            results = [flight.metadata for flight in flights.values()]
            done, waiting = await asyncio.wait(
                results, timeout=job.seconds_to_wait, return_when=asyncio.FIRST_EXCEPTION
            )
            for result in done:
                if error := result.exception():
                    raise error
            if waiting:
                raise self._too_late(flights.values())
        finally:
            for name, flight in flights.items():
                if (encoded := flight.for_trail) is not None:
                    job.trail.encoded(name, asked_at, encoded)
                self._leave(flight, job)
            self._feed()
        job.published_at = {**job.published_at, **{name: flight.published_at for name, flight in flights.items()}}
        return flights

    def _too_late(self, flights: Iterable[Flight]) -> ChiasmError:
        """Return the error for a request whose deadline passes before these images are encoded."""
        if all((flight.calls and not flight.has_met_full) or flight.metadata.done() for flight in flights):
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
            self._start(Call(feed, [self._flight_of(entry) for entry in feed.entries], now))
        stranded = [self._flight_of(entry) for entry in self._queue.stranded()]
        self._stranded_since = {flight: self._stranded_since.get(flight, now) for flight in stranded}
        is_expected = bool(stranded) and self._comeback.expects(Role.ENCODER)
        for flight, since in self._stranded_since.items():
            if not is_expected or self._can_be_encoded_elsewhere(flight):
                self._settle(flight, none_left(flight))
            elif now - since >= self._comeback_seconds:
                self._settle(flight, none_left(flight, self._comeback_seconds))
        self._metrics.items_waiting.set(len(self._queue))
        if self._waking is not None:
            self._waking.cancel()
            self._waking = None
        if wakes_at := self._queue.wakes_at(now):
            self._waking = asyncio.get_running_loop().call_later(wakes_at - now, self._feed)

    def _can_be_encoded_elsewhere(self, flight: Flight) -> bool:
        """Whether all that wait for it can be answered by an instance that encodes itself."""
        return bool(self._fleet.healthy(Role.AGGREGATED)) and all(
            job.original is not None and not job.exchange.has_begun for job in flight.waiters
        )

    def _start(self, call: Call) -> None:
        for flight in call.flights:
            flight.calls.append(call)
            flight.attempts += 1
        if not call.is_hedge:
            self._tell(call.instance, call.flights, set().union(*(flight.waiters for flight in call.flights)))
            self._watch(call)
        # The waiting request with the latest deadline lends the call its headers.
        waiters = (job for flight in call.flights for job in flight.waiters)
        lender = max(waiters, key=lambda waiter: waiter.exchange.deadline)
        call.task = self._tasks.start(self._run(call, lender))
        call.task.add_done_callback(lambda task: self._end(call))  # also if it was cancelled before it began

    def _watch(self, call: Call) -> None:
        """Hedge a call when it is late."""
        seconds = self._queue.hedging.late_after(call.seconds) if call.seconds else None
        if seconds is not None:
            call.watch = asyncio.get_running_loop().call_later(seconds, self._hedge, call)

    def _hedge(self, call: Call) -> None:
        """Give the images of a late call to a second encoder too; if that can't be now, see later."""
        now = time.monotonic()
        flights = [flight for flight in call.flights if call in flight.calls and flight.waiters]
        if not flights:
            return
        feed = self._queue.hedge([flight.entry for flight in flights], now)
        if feed is None:
            self._watch(call)
            return
        _log.info(
            "%s has not answered for %.3g s; %d image(s) go to %s too.",
            call.instance.url,
            now - call.started_at,
            len(flights),
            feed.encoder.url,
        )
        self._start(Call(feed, flights, now, is_hedge=True))

    def _tell(self, encoder: Instance, flights: Sequence[Flight], jobs: set[Job]) -> None:
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

    async def _run(self, call: Call, lender: Job) -> None:
        try:
            await self._call(call, lender)
        except Exception as error:  # an unexpected one, which is logged when the requests are answered
            for flight in [*call.flights]:
                if self._withdraw(flight, call):
                    self._settle(flight, error)
        finally:
            self._end(call)

    def _end(self, call: Call) -> None:
        """Note, once, that a call has ended in whatever way."""
        if call.has_ended:
            return
        call.has_ended = True
        if call.watch is not None:
            call.watch.cancel()
        self._queue.release(call.entries, time.monotonic())
        call.flights.clear()
        if call.is_hedge:
            self._metrics.hedges.labels("won" if call.has_won else "lost").inc()
        self._feed()

    async def _call(self, call: Call, lender: Job) -> None:
        instance = call.instance
        try:
            with self._fleet.working(instance, sum(entry.seconds for entry in call.entries)):
                async with asyncio.timeout(self._timeout_seconds):
                    response = await self._post(call, lender)
        except UpstreamError as error:
            await self._lose(call, error)
            return
        except TimeoutError:
            self._exclude(call.flights, instance)
            self._again(call, call.flights, UpstreamError(f"An encoder took longer than {self._timeout_seconds:g} s."))
            return
        if response.status == 200:
            self._accept(call, response)
            return
        if not 400 <= response.status <= 599:  # a redirection, for example, which is no answer for the client
            self._exclude(call.flights, instance)
            self._again(call, call.flights, UpstreamError(f"An encoder answered with status {response.status}."))
            return
        refusal = RefusedError(response)
        if refusal.refuses_signature:
            await self._lose(call, refusal)
            return
        if refusal.is_leaving:  # if no other is left, its images wait only when it is known to be unhealthy
            await self._prober.lost(instance, refusal)
        self._refuse(call, refusal)

    async def _lose(self, call: Call, error: ChiasmError) -> None:
        """Probe the encoder of a call that has failed, and have the images go elsewhere, or there again if it is the last."""
        is_healthy = await self._prober.lost(call.instance, error)
        for flight in call.flights:
            if not is_healthy or self._has_another(flight, call.instance):
                flight.entry.failed_at.add(call.instance)
        self._again(call, call.flights, error)

    async def _post(self, call: Call, lender: Job) -> UpstreamResponse:
        is_small = sum(flight.item.part_bytes for flight in call.flights) <= INLINE_BYTES
        model = lender.request.model
        body = call.body(model) if is_small else await asyncio.to_thread(call.body, model)
        request_id.set(lender.exchange.request_id)
        headers = lender.headers_for_encoder(self._timeout_seconds)
        with await self._upstream.post(call.instance.url, CHAT_PATH, body, headers) as response:
            return await response.read(_MAX_RESPONSE_BYTES)

    def _accept(self, call: Call, response: UpstreamResponse) -> None:
        try:
            published = _body.decode(response.body).ec_transfer_params or {}
        except UNREADABLE:
            published = {}
        now = time.monotonic()
        timing = response.timing
        encode_seconds = duration_of(timing, "encode")
        encoder_call = EncoderCall(
            call.instance.address, call.started_at, now, response.headers.get("server-timing", "")
        )
        done = [flight for flight in call.flights if flight.item.identifier in published]
        missing = [flight for flight in call.flights if flight.item.identifier not in published]
        self._queue.finish(
            [entry for entry in call.entries if entry.encoder is not None and entry.item.identifier in published],
            now,
            seconds=_computed_seconds(timing) if not missing else None,
            found=call.found(timing),
        )
        if not missing and call.seconds:
            self._queue.hedging.learn(now - call.started_at, call.seconds)
        self._win(call, done, now)
        for flight in done:
            for job in flight.waiters:
                job.note_instance(call.instance)
            flight.encode_seconds, flight.published_at = encode_seconds, now
            flight.encoded = EncodedAt(encoder_call, call.flights.index(flight))
            self._settle(flight, bytes(published[flight.item.identifier].metadata), by=call)
        if missing:
            self._exclude(missing, call.instance)
            self._again(
                call, missing, UpstreamError("An encoder's answer doesn't name the image in ec_transfer_params.")
            )

    def _win(self, call: Call, done: Sequence[Flight], now: float) -> None:
        """Note that images are published, if that was by a hedge: the encoder that had them first was late."""
        won = [flight for flight in done if call in flight.calls] if call.is_hedge else []
        if not won:
            return
        call.has_won = True
        for first in {flight.calls[0] for flight in won} - {call}:
            self._queue.hedging.learn(now - first.started_at, first.seconds)  # it would have taken longer
            self._queue.pause(first.instance, now)
        moved = [flight for flight in won if flight.calls[0] is not call]
        self._tell(call.instance, moved, set().union(*(flight.waiters for flight in moved)))

    def _refuse(self, call: Call, error: RefusedError) -> None:
        if error.is_full:
            self._queue.pause(call.instance, time.monotonic())
            self._metrics.encode_refusals.inc()
            for flight in call.flights:
                flight.attempts -= 1  # the encoder hasn't failed
                flight.has_met_full = True
                if self._withdraw(flight, call):
                    self._requeue(flight)
            return
        if error.status >= 500 or error.status in _TRY_ELSEWHERE:
            self._exclude(call.flights, call.instance)
            self._again(call, call.flights, error)
            return
        if len(call.flights) == 1:
            self._settle(call.flights[0], error, by=call)
            return
        # One of several images is bad. Requests that sent all of them get the error; images that others need go again alone.
        owners = set.intersection(*(flight.waiters for flight in call.flights))
        for flight in call.flights:
            if flight.waiters <= owners:
                self._settle(flight, error, by=call)
            elif self._withdraw(flight, call):
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

    def _to_avoid(self, places: Sequence[ECPlace]) -> set[Instance]:
        """Return the encoders at these places; if no other is left, those at the last one; none if that is the only one."""
        encoders = self._fleet.healthy(Role.ENCODER)
        for some in (places, places[-1:]):
            avoided = {one for one in encoders if one.ec_place in some}
            if len(avoided) < len(encoders):
                return avoided
        return set()

    def _has_another(self, flight: Flight, encoder: Instance) -> bool:
        """Whether a healthy encoder besides this one may get an image."""
        return any(
            one is not encoder and one not in flight.entry.failed_at for one in self._fleet.healthy(Role.ENCODER)
        )

    def _exclude(self, flights: Sequence[Flight], instance: Instance) -> None:
        for flight in flights:
            flight.entry.failed_at.add(instance)

    def _again(self, call: Call, flights: Sequence[Flight], error: ChiasmError) -> None:
        _log.info("%s has not encoded %d image(s): %s", call.instance.url, len(flights), error.message)
        for flight in flights:
            if not self._withdraw(flight, call):
                continue
            flight.fault = error
            if flight.attempts >= self._max_attempts:
                self._settle(flight, none_left(flight))
            else:
                self._metrics.encode_retries.inc()
                self._requeue(flight)

    def _withdraw(self, flight: Flight, call: Call) -> bool:
        """Note that a call won't publish an image; return whether somebody waits for it and no other call does it."""
        if call not in flight.calls:
            return False
        was_first = flight.calls[0] is call
        flight.calls.remove(call)
        if flight.calls and was_first:
            self._tell(flight.calls[0].instance, [flight], flight.waiters)
        if not flight.calls and not flight.waiters:
            self._abandon(flight)
            return False
        return not flight.calls

    def _requeue(self, flight: Flight, *, alone: bool = False) -> None:
        """Let a flight wait again; ``alone`` for one that must not share a call."""
        if alone:
            flight.entry.request = flight
        self._queue.release([flight.entry], time.monotonic())
        self._queue.add(flight.entry)

    def _settle(self, flight: Flight, outcome: bytes | Exception, by: Call | None = None) -> None:
        self._forget(flight)
        self._queue.discard(flight.entry, time.monotonic())
        self._cancel_calls(flight, but=by)
        if flight.metadata.done():
            return
        if isinstance(outcome, bytes):
            self._metrics.items.labels("encoded").inc()
            flight.metadata.set_result(outcome)
        else:
            self._metrics.items.labels("failed").inc()
            flight.metadata.set_exception(outcome)

    def _flight_of(self, entry: Entry) -> Flight:
        return self._flights[entry.item.identifier, entry.sharers]

    def _forget(self, flight: Flight) -> None:
        key = flight.item.identifier, flight.entry.sharers
        if self._flights.get(key) is flight:
            del self._flights[key]

    def _leave(self, flight: Flight, job: Job) -> None:
        flight.waiters.discard(job)
        if flight.calls and job.embeddings_are_read:
            asyncio.get_running_loop().call_later(_AFTER_ANSWER_SECONDS, self._abandon, flight)
        else:
            self._abandon(flight)

    def _abandon(self, flight: Flight) -> None:
        """Give a flight up, unless it has ended or somebody waits for it."""
        if flight.waiters or flight.metadata.done():
            return
        self._forget(flight)
        flight.metadata.cancel()
        if not flight.calls:
            self._queue.discard(flight.entry, time.monotonic())
        self._cancel_calls(flight)

    def _cancel_calls(self, flight: Flight, but: Call | None = None) -> None:
        """Take a flight from its calls, and cancel those that have no other."""
        calls, flight.calls = flight.calls, []
        for call in calls:
            if call is not but and call.task is not None and not call.is_needed:
                call.task.cancel()


def _computed_seconds(timing: Sequence[TimingEntry]) -> float | None:
    """Return what an encoder has computed for a call; None if it doesn't say."""
    seconds = [one.seconds for one in timing if one.name in {"preprocess", "encode"} and one.seconds is not None]
    return sum(seconds) if seconds else None
