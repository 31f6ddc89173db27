"""Pixels to encoders: spread over them, each item once at a time, again elsewhere if one fails.

A *flight* is the encoding of one item, whoever asked for it: requests that need the same item while it is under way wait
for the one flight. A *call* is one HTTP request to one encoder and carries flights that one request began. A flight that
nobody waits for any more is given up, and with the last flight of a call the call is cancelled.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence

import msgspec
from msgspec import Raw

from chiasm.errors import EmbeddingUnavailableError, OverloadedError
from chiasm.proxy.context import RequestContext
from chiasm.proxy.fleet import Fleet, Instance
from chiasm.proxy.items import Item
from chiasm.proxy.metrics import Metrics
from chiasm.proxy.probe import Prober
from chiasm.proxy.timing import duration_seconds
from chiasm.proxy.upstream import Answer, AnsweredError, Upstream, UpstreamError
from chiasm.wire import Role

_PATH = "/v1/chat/completions"
_MAX_ANSWER_BYTES = 8 << 20
_TRY_ELSEWHERE = frozenset({408, 425, 429})
"""Statuses below 500 that say something of the encoder, not of the item."""


class Encoded(msgspec.Struct, frozen=True):
    """What an encoder says of an item whose embedding is now where PD finds it."""

    metadata: bytes
    """JSON, as it came."""
    encode_seconds: float | None
    """The encoder's own figure for its call."""


class _Entry(msgspec.Struct):
    metadata: Raw = Raw(b"{}")


class _Reply(msgspec.Struct):
    ec_transfer_params: dict[str, _Entry] | None = None


_reply = msgspec.json.Decoder(_Reply)


class _Flight:
    def __init__(self, item: Item) -> None:
        self.item = item
        self.waiters: set[RequestContext] = set()
        self.result: asyncio.Future[Encoded] = asyncio.get_running_loop().create_future()
        # A failure that all waiters left before it came is nobody's to see.
        self.result.add_done_callback(lambda future: future.cancelled() or future.exception())
        self.call: _Call | None = None
        self.attempts = 0
        self.failed_at: set[Instance] = set()


class _Call:
    def __init__(self, instance: Instance, flights: list[_Flight]) -> None:
        self.instance = instance
        self.flights = flights
        self.task: asyncio.Task[None] | None = None


class Encoders:
    """All flights of the proxy."""

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

    async def encode(self, items: Iterable[Item], context: RequestContext) -> dict[str, Encoded]:
        """Have all items encoded; returns by identifier when all are. Leaving early gives up what only this one wanted.

        Raises OverloadedError or EmbeddingUnavailableError if no encoder is left, and AnsweredError with the answer of
        an encoder that refused an item.
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
            flight.waiters.add(context)
            flights[item.identifier] = flight
        try:
            self._dispatch(fresh)
            results = [flight.result for flight in flights.values()]
            done, _ = await asyncio.wait(results, return_when=asyncio.FIRST_EXCEPTION)
            for result in done:
                if error := result.exception():
                    raise error
            encoded = {name: flight.result.result() for name, flight in flights.items()}
        finally:
            for flight in flights.values():
                self._leave(flight, context)
        context.timing.encode_call = time.perf_counter() - started
        context.timing.encode = max(
            (one.encode_seconds for one in encoded.values() if one.encode_seconds is not None), default=None
        )
        self._metrics.encode.observe(context.timing.encode_call)
        return encoded

    def _dispatch(self, flights: Sequence[_Flight]) -> None:
        """Large items are placed first, each at the encoder with the least to do; one call for each encoder."""
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
            # In the prompt's order: prefill goes on with the first that is there.
            batch.sort(key=order.__getitem__)
            most = (instance.report and instance.report.max_items) or len(batch)
            for first in range(0, len(batch), most):
                self._start(instance, batch[first : first + most])

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
                    answer = await self._ask(call)
        except UpstreamError as error:
            if not await self._prober.lost(instance, error):
                self._exclude(call, instance)
            self._again(call.flights, error)
            return
        except TimeoutError:
            self._exclude(call, instance)
            self._again(call.flights, UpstreamError(f"the encoder took longer than {self._timeout_seconds:g} s"))
            return
        if answer.status != 200:
            self._refused(call, answer)
            return
        self._take(call, answer)

    async def _ask(self, call: _Call) -> Answer:
        # Of all that wait, the request that can wait longest speaks for the call.
        context = max((one for flight in call.flights for one in flight.waiters), key=lambda one: one.deadline)
        url = call.instance.url + _PATH
        with await self._upstream.post(url, _body(call, context), context.headers_for_encoder()) as response:
            return await response.read(_MAX_ANSWER_BYTES)

    def _take(self, call: _Call, answer: Answer) -> None:
        try:
            entries = _reply.decode(answer.body).ec_transfer_params or {}
        except msgspec.MsgspecError:
            entries = {}
        encode_seconds = duration_seconds(answer.headers.get("Server-Timing"), "encode")
        missing: list[_Flight] = []
        for flight in call.flights:
            entry = entries.get(flight.item.identifier)
            if entry is None:
                missing.append(flight)
            else:
                self._settle(flight, Encoded(bytes(entry.metadata), encode_seconds))
        if missing:
            self._exclude(call, call.instance)
            self._again(missing, UpstreamError("the encoder's answer doesn't name the item in ec_transfer_params"))

    def _refused(self, call: _Call, answer: Answer) -> None:
        if answer.status >= 500 or answer.status in _TRY_ELSEWHERE or answer.status < 400:
            self._exclude(call, call.instance)
            self._again(call.flights, AnsweredError(answer))
            return
        if len(call.flights) == 1:
            self._settle(call.flights[0], AnsweredError(answer))
            return
        # One item of several is bad. Whoever sent them together learns it at once; what others wait for goes alone.
        owners = set.intersection(*(flight.waiters for flight in call.flights))
        for flight in call.flights:
            if flight.waiters <= owners:
                self._settle(flight, AnsweredError(answer))
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
                self._settle(flight, error if isinstance(error, AnsweredError) else _none_left(flight))
            else:
                retried.append(flight)
        self._metrics.encode_retries.inc(len(retried))
        self._dispatch(retried)

    def _settle(self, flight: _Flight, outcome: Encoded | Exception) -> None:
        self._forget(flight)
        flight.call = None  # no cycle that would keep the image's bytes until a garbage collection
        if flight.result.done():
            return
        if isinstance(outcome, Encoded):
            self._metrics.items.labels("encoded").inc()
            flight.result.set_result(outcome)
        else:
            self._metrics.items.labels("failed").inc()
            flight.result.set_exception(outcome)

    def _forget(self, flight: _Flight) -> None:
        if self._flights.get(flight.item.identifier) is flight:
            del self._flights[flight.item.identifier]

    def _leave(self, flight: _Flight, context: RequestContext) -> None:
        flight.waiters.discard(context)
        if flight.waiters or flight.result.done():
            return
        self._forget(flight)
        flight.result.cancel()
        call, flight.call = flight.call, None
        if call is not None and call.task is not None and not any(one.waiters for one in call.flights):
            call.task.cancel()


def _none_left(flight: _Flight) -> Exception:
    if not flight.attempts:
        return OverloadedError("no encoder is healthy; try again", code="no_encoder")
    return EmbeddingUnavailableError(
        f"encoding an image failed {flight.attempts} time(s) and no other encoder is left", code="encoder_lost"
    )


def _body(call: _Call, context: RequestContext) -> bytes:
    models = call.instance.report.models if call.instance.report else ()
    model = context.model if context.model in models or not models else models[0]
    return b'{"model":%b,"messages":[{"role":"user","content":[%b]}],"max_tokens":1,"stream":false}' % (
        msgspec.json.encode(model),
        b",".join([flight.item.image_url_part() for flight in call.flights]),
    )
