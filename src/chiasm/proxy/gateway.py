"""What lives as long as the proxy, and the bounds within which each request is answered."""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor

from aiohttp.abc import AbstractResolver

from chiasm.errors import ChiasmError, DeadlineExceededError, OverloadedError
from chiasm.media import Fetcher
from chiasm.proxy.admission import Admission, Ticket
from chiasm.proxy.config import ProxyConfig, check_url
from chiasm.proxy.context import RequestContext
from chiasm.proxy.encode import Encoders
from chiasm.proxy.exchange import CLIENT_CLOSED, ClientGoneError, Exchange
from chiasm.proxy.fleet import Fleet
from chiasm.proxy.language import LanguageInstances
from chiasm.proxy.metrics import Metrics
from chiasm.proxy.probe import Prober
from chiasm.proxy.request import parse_chat, parse_completion
from chiasm.proxy.services import Services
from chiasm.proxy.upstream import Upstream
from chiasm.proxy.way import Way
from chiasm.wire import Role

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"

_log = logging.getLogger(__name__)
_MEDIA_THREADS = 2


class Gateway:
    """The proxy without its routes. ``start`` and ``close`` on the loop that serves."""

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
        self.prober = Prober(
            self.fleet,
            self._upstream,
            interval_seconds=config.probe_interval_seconds,
            timeout_seconds=config.probe_timeout_seconds,
        )
        encoders = Encoders(
            self.fleet,
            self._upstream,
            self.prober,
            self.metrics,
            timeout_seconds=config.encode_timeout_seconds,
            max_attempts=config.max_encode_attempts,
        )
        self._services = Services(
            config=config,
            fleet=self.fleet,
            metrics=self.metrics,
            fetcher=Fetcher(config.media, resolver=self._resolver),
            executor=ThreadPoolExecutor(_MEDIA_THREADS, thread_name_prefix="media"),
            encoders=encoders,
            language=LanguageInstances(self.fleet, self._upstream, self.prober, self.metrics),
        )
        roles = (
            (Role.PD, config.pds),
            (Role.AGGREGATED, config.aggregated),
            (Role.PREFILL, config.prefills),
            (Role.DECODE, config.decodes),
            (Role.ENCODER, config.encoders),
        )
        instances = [self.fleet.add(check_url(url), role) for role, urls in roles for url in urls]
        for instance in instances:
            self.prober.watch(instance)
        checks = [asyncio.ensure_future(self.prober.check(instance)) for instance in instances]
        if checks:
            await asyncio.wait(checks, timeout=1.0)

    async def close(self) -> None:
        await self._services.encoders.close()
        await self.prober.close()
        await self._services.fetcher.close()
        await self._upstream.close()
        self._services.executor.shutdown(wait=False, cancel_futures=True)

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
                    way = await self._read(path, exchange, ticket, context)
                    async with exchange.until_client_leaves():
                        await way.go()
            except TimeoutError:
                if not limit.expired():
                    raise
                raise DeadlineExceededError(f"the request's deadline of {seconds:g} s has passed") from None

    async def _read(self, path: str, exchange: Exchange, ticket: Ticket, context: RequestContext) -> Way:
        body = await exchange.read_body(
            ticket, max_bytes=self.config.max_body_bytes, timeout_seconds=self.config.body_timeout_seconds
        )
        started = time.perf_counter()
        request = parse_chat(body) if path == CHAT else parse_completion(body)
        context.model = request.model
        return Way(self._services, path, request, exchange=exchange, ticket=ticket, context=context, started=started)


def _deadline_seconds(exchange: Exchange, most_seconds: float) -> float:
    """A client may ask for an earlier deadline."""
    asked = exchange.headers.get(b"x-request-deadline-ms", b"")
    return min(most_seconds, int(asked) / 1000) if asked.isdigit() and len(asked) < 12 else most_seconds
