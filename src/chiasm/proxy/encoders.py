"""Images to encoders: spread over them, each encoded once at a time, and again elsewhere if an encoder fails.

A *flight* is the encoding of one image, whichever request asked for it: requests that need the same image meanwhile wait for
the one flight. A *call* is one HTTP request to one encoder and carries flights that one request began. A flight for which
nobody waits any more is abandoned, and a call is cancelled with its last flight.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence

import msgspec

from chiasm.errors import Code, EmbeddingUnavailableError, OverloadedError
from chiasm.http.timing import duration_seconds
from chiasm.proxy.fleet import Fleet, Instance
from chiasm.proxy.job import Job
from chiasm.proxy.media import Item
from chiasm.proxy.metrics import Metrics
from chiasm.proxy.probe import Prober
from chiasm.proxy.upstream import RefusedError, Upstream, UpstreamError, UpstreamResponse
from chiasm.wire import CHAT_PATH, ECItem, Role

_MAX_RESPONSE_BYTES = 8 << 20
_TRY_ELSEWHERE = frozenset({408, 425, 429})
"""Statuses below 500 for which the encoder is to blame, not the image."""


class _Body(msgspec.Struct):
    """The part of an encoder's response that matters here."""

    ec_transfer_params: dict[str, ECItem] | None = None


_body = msgspec.json.Decoder(_Body)


class _Flight:
    def __init__(self, item: Item) -> None:
        self.item = item
        self.waiters: set[Job] = set()
        self.metadata: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        # Marks a failure as seen, also if all waiters have left before it.
        self.metadata.add_done_callback(lambda future: future.cancelled() or future.exception())
        self.encode_seconds: float | None = None
        """The time that the encoder itself reports for its call."""
        self.call: _Call | None = None
        self.attempts = 0
        self.failed_at: set[Instance] = set()


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
        *,
        timeout_seconds: float,
        max_attempts: int,
    ) -> None:
        self._fleet = fleet
        self._upstream = upstream
        self._prober = prober
        self._metrics = metrics
        self._timeout_seconds = timeout_seconds
        self._max_attempts = max_attempts
        self._flights: dict[str, _Flight] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def encode(self, items: Iterable[Item], job: Job) -> dict[str, bytes]:
        """Have images encoded; return the encoders' metadata (JSON) by identifier when all embeddings are published.

        Cancelling it abandons the images that only this request needs. Raises OverloadedError or EmbeddingUnavailableError if
        no encoder is left, and RefusedError with the response of an encoder that refused an image.
        """
        started = time.perf_counter()
        flights: dict[str, _Flight] = {}
        fresh: list[_Flight] = []
        for item in items:
            if item.identifier in flights:
                continue
            flight = self._flights.get(item.identifier)
            if flight is None:
                flight = self._flights[item.identifier] = _Flight(item)
                fresh.append(flight)
            else:
                self._metrics.items.labels("joined").inc()
            flight.waiters.add(job)
            flights[item.identifier] = flight
        try:
            self._dispatch(fresh)
            results = [flight.metadata for flight in flights.values()]
            done, _ = await asyncio.wait(results, return_when=asyncio.FIRST_EXCEPTION)
            for result in done:
                if error := result.exception():
                    raise error
            metadata = {name: flight.metadata.result() for name, flight in flights.items()}
        finally:
            for flight in flights.values():
                self._leave(flight, job)
        job.timing.encode_call = time.perf_counter() - started
        known = (flight.encode_seconds for flight in flights.values())
        job.timing.encode = max((seconds for seconds in known if seconds is not None), default=None)
        self._metrics.encode.observe(job.timing.encode_call)
        return metadata

    def _dispatch(self, flights: Sequence[_Flight]) -> None:
        """Give large images first, each to the encoder with the least to do, in one call per encoder."""
        planned: dict[Instance, list[_Flight]] = {}

        def ahead(instance: Instance) -> float:
            return float(sum(flight.item.pixels for flight in planned.get(instance, ())))

        for flight in sorted(flights, key=lambda flight: -flight.item.pixels):
            instance = self._fleet.choose(Role.ENCODER, exclude=flight.failed_at, ahead=ahead)
            if instance is None:
                self._settle(flight, _none_left(flight))
            else:
                planned.setdefault(instance, []).append(flight)
        order = {flight: index for index, flight in enumerate(flights)}
        for instance, batch in planned.items():
            # In the prompt's order, since prefill needs the first image first.
            batch.sort(key=order.__getitem__)
            limit = (instance.health and instance.health.max_items) or len(batch)
            for first in range(0, len(batch), limit):
                self._start(instance, batch[first : first + limit])

    def _start(self, instance: Instance, flights: list[_Flight]) -> None:
        call = _Call(instance, flights)
        for flight in flights:
            flight.call = call
            flight.attempts += 1
        call.task = asyncio.create_task(self._run(call))
        self._tasks.add(call.task)
        call.task.add_done_callback(self._tasks.discard)
        call.task.add_done_callback(lambda task: call.flights.clear())

    async def _run(self, call: _Call) -> None:
        instance = call.instance
        try:
            with self._fleet.working(instance, sum(flight.item.pixels for flight in call.flights)):
                async with asyncio.timeout(self._timeout_seconds):
                    response = await self._post(call)
        except UpstreamError as error:
            if not await self._prober.lost(instance, error):
                self._exclude(call, instance)
            self._again(call.flights, error)
            return
        except TimeoutError:
            self._exclude(call, instance)
            self._again(call.flights, UpstreamError(f"An encoder took longer than {self._timeout_seconds:g} s."))
            return
        if response.status == 200:
            self._accept(call, response)
        else:
            self._refuse(call, response)

    async def _post(self, call: _Call) -> UpstreamResponse:
        # The waiting request with the latest deadline lends the call its headers.
        waiters = (job for flight in call.flights for job in flight.waiters)
        job = max(waiters, key=lambda waiter: waiter.exchange.deadline)
        url = call.instance.url + CHAT_PATH
        with await self._upstream.post(url, _request_body(call, job), job.headers_for_encoder()) as response:
            return await response.read(_MAX_RESPONSE_BYTES)

    def _accept(self, call: _Call, response: UpstreamResponse) -> None:
        try:
            published = _body.decode(response.body).ec_transfer_params or {}
        except msgspec.MsgspecError:
            published = {}
        encode_seconds = duration_seconds(response.headers.get("Server-Timing"), "encode")
        missing: list[_Flight] = []
        for flight in call.flights:
            item = published.get(flight.item.identifier)
            if item is None:
                missing.append(flight)
            else:
                flight.encode_seconds = encode_seconds
                self._settle(flight, bytes(item.metadata))
        if missing:
            self._exclude(call, call.instance)
            self._again(missing, UpstreamError("An encoder's answer doesn't name the image in ec_transfer_params."))

    def _refuse(self, call: _Call, response: UpstreamResponse) -> None:
        error = RefusedError(response)
        if response.status >= 500 or response.status in _TRY_ELSEWHERE or response.status < 400:
            self._exclude(call, call.instance)
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
                self._start(call.instance, [flight])

    def _exclude(self, call: _Call, instance: Instance) -> None:
        for flight in call.flights:
            flight.failed_at.add(instance)

    def _again(self, flights: Sequence[_Flight], error: Exception) -> None:
        retried: list[_Flight] = []
        for flight in flights:
            if not flight.waiters:
                continue
            if flight.attempts >= self._max_attempts:
                self._settle(flight, error if isinstance(error, RefusedError) else _none_left(flight))
            else:
                retried.append(flight)
        self._metrics.encode_retries.inc(len(retried))
        self._dispatch(retried)

    def _settle(self, flight: _Flight, outcome: bytes | Exception) -> None:
        self._forget(flight)
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
        if call is not None and call.task is not None and not any(one.waiters for one in call.flights):
            call.task.cancel()


def _none_left(flight: _Flight) -> Exception:
    if not flight.attempts:
        return no_encoder()
    return EmbeddingUnavailableError(
        f"An image could not be encoded in {flight.attempts} attempts, and no other encoder is left; try again.",
        code=Code.ENCODER_LOST,
    )


def no_encoder() -> OverloadedError:
    """Return the error for a request whose images nobody can encode."""
    return OverloadedError("No encoder is healthy; try again.", code=Code.NO_ENCODER)


def _request_body(call: _Call, job: Job) -> bytes:
    models, model = call.instance.models, job.request.model
    if models and model not in models:
        model = models[0]
    return b'{"model":%b,"messages":[{"role":"user","content":[%b]}],"max_tokens":1,"stream":false}' % (
        msgspec.json.encode(model),
        b",".join([flight.item.image_url_part() for flight in call.flights]),
    )
