"""The way of a request through the proxy, from its body to its answer."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from aiohttp.abc import AbstractResolver

from chiasm.errors import ChiasmError, DeadlineExceededError, InvalidRequestError, MediaError, OverloadedError
from chiasm.media import Fetcher
from chiasm.proxy.admission import Admission, Ticket
from chiasm.proxy.config import ProxyConfig, check_url
from chiasm.proxy.context import RequestContext
from chiasm.proxy.encode import Encoded, Encoders
from chiasm.proxy.exchange import CLIENT_CLOSED, ClientGoneError, Exchange
from chiasm.proxy.fleet import LANGUAGE_ROLES, Fleet, Instance, Role
from chiasm.proxy.items import Item, read_items
from chiasm.proxy.language import LanguageInstances, Place
from chiasm.proxy.metrics import Metrics
from chiasm.proxy.probe import Prober
from chiasm.proxy.request import ChatRequest, parse_chat, parse_completion
from chiasm.proxy.upstream import Call, Upstream

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_COST_OF_A_REQUEST = 1000.0
_COST_OF_AN_ITEM = 4000.0
"""In bytes of text: an item takes about as many tokens of a prompt."""
_PIXELS_PER_COST = 64
"""What encoding costs an aggregated instance on top."""
_MEDIA_THREADS = 2


class Gateway:
    """Everything that lives as long as the proxy. ``start`` and ``close`` on the loop that serves."""

    def __init__(self, config: ProxyConfig, resolver: AbstractResolver | None = None) -> None:
        self.config = config
        self.fleet = Fleet()
        self.metrics = Metrics(self.fleet)
        self._admission = Admission(config.max_concurrent_requests, config.max_buffered_bytes)
        self._resolver = resolver
        self._requests: set[asyncio.Task[object]] = set()

    async def start(self) -> None:
        """Open connections and ask every instance once how it is."""
        config = self.config
        self._upstream = Upstream(config.connect_timeout_seconds)
        self._fetcher = Fetcher(config.media, resolver=self._resolver)
        self._executor = ThreadPoolExecutor(_MEDIA_THREADS, thread_name_prefix="media")
        self.prober = Prober(
            self.fleet,
            self._upstream,
            interval_seconds=config.probe_interval_seconds,
            timeout_seconds=config.probe_timeout_seconds,
        )
        self._encoders = Encoders(
            self.fleet,
            self._upstream,
            self.prober,
            self.metrics,
            timeout_seconds=config.encode_timeout_seconds,
            max_attempts=config.max_encode_attempts,
        )
        self._language = LanguageInstances(self.fleet, self._upstream, self.prober, self.metrics)
        roles = ((Role.PD, config.pds), (Role.AGGREGATED, config.aggregated), (Role.ENCODER, config.encoders))
        instances = [self.fleet.add(check_url(url), role) for role, urls in roles for url in urls]
        for instance in instances:
            self.prober.watch(instance)
        checks = [asyncio.ensure_future(self.prober.check(instance)) for instance in instances]
        if checks:
            await asyncio.wait(checks, timeout=1.0)

    async def close(self) -> None:
        await self._encoders.close()
        await self.prober.close()
        await self._fetcher.close()
        await self._upstream.close()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def end_requests(self) -> None:
        """End all that are being answered, each with an error that says so."""
        for task in self._requests:
            task.cancel()

    async def handle(self, path: str, exchange: Exchange) -> None:
        """Answer one request, whatever comes."""
        task = asyncio.current_task()
        assert task is not None
        self._requests.add(task)
        with self.metrics.in_flight.track_inprogress():
            try:
                await self._handle_within_bounds(path, exchange)
            except ClientGoneError:
                exchange.status = CLIENT_CLOSED
            except ChiasmError as error:
                await exchange.fail(error)
            except asyncio.CancelledError:
                # The server ends. Answering is the last that this task does, so it isn't raised again.
                await exchange.fail(OverloadedError("the proxy is shutting down; try again", code="shutting_down"))
            except Exception:
                _log.exception("request %s failed in the proxy", exchange.request_id)
                await exchange.fail(ChiasmError("the proxy failed on this request; its log says more"))
            finally:
                self._requests.discard(task)
                self.metrics.requests.labels(path, str(exchange.status or CLIENT_CLOSED)).inc()

    async def _handle_within_bounds(self, path: str, exchange: Exchange) -> None:
        seconds = _deadline_seconds(exchange, self.config.deadline_seconds)
        with self._admission.enter() as ticket:
            try:
                async with asyncio.timeout(seconds) as limit:
                    context = RequestContext(
                        request_id=exchange.request_id,
                        deadline=time.monotonic() + seconds,
                        passed_on=exchange.passed_on(),
                        timing=exchange.timing,
                    )
                    body = await exchange.read_body(
                        ticket,
                        max_bytes=self.config.max_body_bytes,
                        timeout_seconds=self.config.body_timeout_seconds,
                    )
                    async with exchange.until_client_leaves():
                        if path == CHAT:
                            await self._chat(body, exchange, context, ticket)
                        else:
                            await self._completion(body, exchange, context)
            except TimeoutError:
                if not limit.expired():
                    raise
                raise DeadlineExceededError(f"the request's deadline of {seconds:g} s has passed") from None

    async def _completion(self, body: bytes, exchange: Exchange, context: RequestContext) -> None:
        started = time.perf_counter()
        request = parse_completion(body)
        context.model = request.model
        self._language.check_model(request.model)
        self._note_overhead("text", started, context)
        await self._pass(COMPLETIONS, body, exchange, context)

    async def _chat(self, body: bytes, exchange: Exchange, context: RequestContext, ticket: Ticket) -> None:
        started = time.perf_counter()
        request = parse_chat(body)
        context.model = request.model
        self._language.check_model(request.model)
        if not request.media:
            self._note_overhead("text", started, context)
            await self._pass(CHAT, body, exchange, context)
            return
        self._check_media(request)
        try:
            media = await read_items(
                request.media,
                fetcher=self._fetcher,
                executor=self._executor,
                fingerprint=self.fleet.fingerprint,
                salt=request.salt,
                hold=ticket.hold,
            )
        except MediaError:
            self.metrics.items.labels("refused").inc()
            raise
        context.timing.fetch = media.fetch_seconds
        if media.fetch_seconds is not None:
            self.metrics.fetch.observe(media.fetch_seconds)
        cost = _media_cost(request, media.items)
        with self._language.place(request.model, cost, self._roles_for_media()) as place:
            if place.instance.role is Role.AGGREGATED:
                await self._chat_aggregated(request, media.items, place, started, exchange, context)
            else:
                await self._chat_disaggregated(request, media.items, place, started, exchange, context)

    def _check_media(self, request: ChatRequest) -> None:
        most = min(self.config.max_items, self.fleet.max_items or self.config.max_items)
        if len(request.media) > most:
            raise InvalidRequestError(
                f"the request has {len(request.media)} images; at most {most} are taken",
                param="messages",
                code="too_many_images",
            )
        if not self._roles_for_media():
            raise OverloadedError("no encoder is healthy; try again", code="no_encoder")

    def _roles_for_media(self) -> tuple[Role, ...]:
        """A PD can take media only where an encoder makes the embeddings."""
        encoders = self.fleet.healthy(Role.ENCODER)
        return tuple(role for role in LANGUAGE_ROLES if (role is not Role.PD or encoders) and self.fleet.healthy(role))

    async def _pass(self, path: str, body: bytes, exchange: Exchange, context: RequestContext) -> None:
        """A body without media, byte for byte."""

        async def body_for(instance: Instance) -> bytes:
            return body

        with (
            self._language.place(context.model, lambda instance: _COST_OF_A_REQUEST + len(body)) as place,
            await self._language.open(place, path, body_for, context) as call,
        ):
            await self._send_back(call, None, exchange)

    async def _chat_aggregated(
        self,
        request: ChatRequest,
        items: list[Item],
        place: Place,
        started: float,
        exchange: Exchange,
        context: RequestContext,
    ) -> None:
        """Media goes along as data: URLs, so that instances never fetch; where that changes nothing, byte for byte."""
        parts = [
            item.image_url_part() if item.fetched or part.has_uuid else None
            for part, item in zip(request.media, items, strict=True)
        ]
        body = request.with_parts(parts) if any(parts) else request.body

        async def body_for(instance: Instance) -> bytes:
            return body

        self._note_overhead("media", started, context)
        with await self._language.open(place, CHAT, body_for, context) as call:
            await self._send_back(call, None, exchange)

    async def _chat_disaggregated(
        self,
        request: ChatRequest,
        items: list[Item],
        place: Place,
        started: float,
        exchange: Exchange,
        context: RequestContext,
    ) -> None:
        """Pixels to encoders and text to PD, at the same time; each ends the other when it fails."""
        sized = request.with_parts([item.image_embeds_part() for item in items])
        self._note_overhead("media", started, context)
        encoding = asyncio.ensure_future(self._encoders.encode(items, context))

        async def body_for(instance: Instance) -> bytes:
            if instance.report is not None and instance.report.understands_image_size:
                return sized
            encoded = await asyncio.shield(encoding)
            return request.with_parts([item.image_embeds_part(encoded[item.identifier].metadata) for item in items])

        opening = asyncio.ensure_future(self._language.open(place, CHAT, body_for, context))
        try:
            await self._send_back(await _unless_fails(encoding, opening), encoding, exchange)
        finally:
            await _end(encoding)
            if call := await _end(opening):
                call.close()

    async def _send_back(
        self, call: Call, encoding: asyncio.Future[dict[str, Encoded]] | None, exchange: Exchange
    ) -> None:
        """The instance's answer, unless encoding fails before there is one."""
        if call.status != 200 or not call.is_stream:
            answer = await _unless_fails(encoding, call.read(self.config.max_answer_bytes))
            await exchange.answer(answer)
            return
        # No head for the client before there is something to tell: until then all can still fail with a status.
        chunk = await _unless_fails(encoding, call.chunk())
        await exchange.start_stream(call.headers)
        while chunk:
            await exchange.send_events(chunk)
            chunk = await _unless_fails(encoding, call.chunk())
        await exchange.end_stream()

    def _note_overhead(self, kind: str, started: float, context: RequestContext) -> None:
        seconds = time.perf_counter() - started - (context.timing.fetch or 0.0)
        context.timing.proxy = seconds
        self.metrics.overhead.labels(kind).observe(seconds)


def _media_cost(request: ChatRequest, items: list[Item]) -> Callable[[Instance], float]:
    text_bytes = max(0, len(request.body) - sum(len(part.url) for part in request.media))
    language = _COST_OF_A_REQUEST + text_bytes + _COST_OF_AN_ITEM * len(items)
    vision = sum(item.pixels for item in items) / _PIXELS_PER_COST
    return lambda instance: language + (vision if instance.role is Role.AGGREGATED else 0.0)


def _deadline_seconds(exchange: Exchange, most_seconds: float) -> float:
    """A client may ask for an earlier deadline."""
    asked = exchange.headers.get(b"x-request-deadline-ms", b"")
    return min(most_seconds, int(asked) / 1000) if asked.isdigit() and len(asked) < 12 else most_seconds


async def _unless_fails(condition: asyncio.Future[dict[str, Encoded]] | None, work: Awaitable[_T]) -> _T:
    """``await work``, but raise what ``condition`` raises as soon as it does; ``work`` is cancelled then."""
    if condition is None or (condition.done() and condition.exception() is None):
        return await work
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            if condition.done():
                condition.result()
                return await task
            await asyncio.wait((task, condition), return_when=asyncio.FIRST_COMPLETED)
        return task.result()
    finally:
        await _end(task)


async def _end(task: asyncio.Future[_T]) -> _T | None:
    """Cancel what is still running; its result if it came to one, and never an exception."""
    if not task.done():
        task.cancel()
        await asyncio.wait((task,))
    return None if task.cancelled() or task.exception() else task.result()
