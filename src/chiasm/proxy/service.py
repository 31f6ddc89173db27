"""What lives as long as the proxy, and the life of a request in it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from aiohttp.abc import AbstractResolver

from chiasm.ec_transfer.stores import open_store
from chiasm.errors import Code, OverloadedError
from chiasm.fleet_key import read_fleet_key
from chiasm.http import Admission, Endpoint, Exchange
from chiasm.http.body import pace_of
from chiasm.http.endpoint import Bounds
from chiasm.http.json_size import INLINE_BYTES
from chiasm.http.listen import check_url
from chiasm.proxy.config import ProxyConfig
from chiasm.proxy.discovery.sources import Sources, parse_source
from chiasm.proxy.fleet import Fleet
from chiasm.proxy.job import Job, Timing
from chiasm.proxy.leases import Leases
from chiasm.proxy.membership import OPTIONS, Listed, Membership
from chiasm.proxy.memory import Memory
from chiasm.proxy.metrics import Metrics
from chiasm.proxy.other_paths import kept_apart, parse_other
from chiasm.proxy.probe import Prober
from chiasm.proxy.records.ring import Records
from chiasm.proxy.records.stages import stages_at_end
from chiasm.proxy.records.tracing import tracing_to
from chiasm.proxy.records.trail import Trail
from chiasm.proxy.request import Request, parse_chat, parse_completion
from chiasm.proxy.routing import Router
from chiasm.proxy.tenants import TenantBy, of_tenant
from chiasm.proxy.upstream import RefusedError, Upstream
from chiasm.wire import CHAT_PATH, COMPLETIONS_PATH, Members, Role

_log = logging.getLogger(__name__)
_FIRST_PROBE_SECONDS = 1.0
_PARSERS = {CHAT_PATH: parse_chat, COMPLETIONS_PATH: parse_completion}
"""Of the paths whose requests the proxy understands."""


class ProxyService:
    """The proxy without its routes. Call ``start`` and ``close`` on the event loop that serves."""

    def __init__(self, config: ProxyConfig, resolver: AbstractResolver | None = None) -> None:
        """``resolver`` looks up the names of media hosts, in place of the system's.

        Raises ConfigurationError for keys that cannot be read, and a shared cache that can't be used.
        """
        self.config = config
        self.fleet = Fleet()
        self.membership = Membership(self.fleet)
        self.metrics = Metrics(self.fleet)
        self.admission = Admission(
            config.max_concurrent_requests, config.max_buffered_bytes, config.http, self.metrics.refusals
        )
        self.memory = Memory()
        self.records = Records()
        self.metrics.in_flight.set_function(lambda: self.records.open)
        self.tracing = tracing_to(config.otlp_traces_endpoint, self.metrics.note_traces)
        self.is_stopping = False
        self.clock: Callable[[], float] = time.time
        self._discovered = [parse_source(argument) for argument in config.discover]
        self._resolver = resolver
        self.fleet_key = read_fleet_key(config.fleet_key_file)
        self._store = open_store(config.store) if config.store else None
        self._parsers = ThreadPoolExecutor(1, thread_name_prefix="parse")
        self.upstream: Upstream
        self.prober: Prober
        self.leases: Leases
        self._sources: Sources
        self.router: Router

    async def start(self, missed: Members | None = None, key: Callable[[], str] = lambda: "") -> None:
        """Open connections and probe every instance once; ``missed`` is what another worker of this proxy knows of them.

        ``key`` returns one of the API keys that clients may have now, with which instances are probed.
        """
        config = self.config
        if self.tracing is not None:
            self.tracing.start()
        self.upstream = Upstream(config.connect_timeout_seconds, self.fleet_key)
        self.prober = Prober(
            self.fleet,
            self.upstream,
            self.metrics,
            interval_seconds=config.probe_interval_seconds,
            timeout_seconds=config.probe_timeout_seconds,
            busy_timeout_seconds=min(config.busy_probe_timeout_seconds, config.probe_timeout_seconds),
            key=key,
        )
        self.router = Router(
            config, self.fleet, self.upstream, self.prober, self.metrics, store=self._store, resolver=self._resolver
        )
        self.leases = Leases(self.membership, self.fleet, self.prober, self.fleet_key, self.now)
        self._sources = Sources(self._discovered, self.membership, self.prober.role_at)
        roles = (
            (Role.PD, config.pds),
            (Role.AGGREGATED, config.aggregated),
            (Role.PREFILL, config.prefills),
            (Role.DECODE, config.decodes),
            (Role.ENCODER, config.encoders),
        )
        self.membership.note_list(OPTIONS, [Listed(check_url(url), role) for role, urls in roles for url in urls])
        if missed is not None:
            self.membership.take_over(missed, time.monotonic())
        self.leases.start()
        self._sources.start()
        instances = self.fleet.instances
        if not instances:
            _log.warning(
                "There is no instance yet: they join with --join, or are found by --discover or added to /instances."
            )
        checks = [asyncio.ensure_future(self.prober.check(instance)) for instance in instances]
        if checks:
            await asyncio.wait(checks, timeout=_FIRST_PROBE_SECONDS)

    async def close(self) -> None:
        await self._sources.close()
        await self.leases.close()
        await self.router.close()
        await self.prober.close()
        self.upstream.close()
        await self.memory.close()
        if self.tracing is not None:
            await self.tracing.close()
        self._parsers.shutdown(wait=False, cancel_futures=True)

    def now(self) -> float:
        """Return Unix time on the clock by which instances sign their leases."""
        return self.clock()

    def stop(self) -> None:
        """Refuse new requests from now on."""
        self.is_stopping = True
        self.leases.stop()

    def interrupt_all(self) -> None:
        """End all requests with an error, because the proxy is shutting down."""
        self.admission.interrupt_all(_stopping())

    def endpoint(self, path: str) -> Endpoint:
        """Return the ASGI application that answers requests to ``path``."""

        def start(exchange: Exchange) -> None:
            self._begin_trace(self.records.begin(exchange), exchange, path)
            if self.is_stopping:
                raise _stopping()

        def count(exchange: Exchange) -> None:
            self.memory.note_released(self.admission.released_bytes)
            record = self.records.end(exchange, path)
            if self.tracing is not None:
                self.tracing.offer(record)
            self.metrics.requests_of(path, exchange.status).inc()
            if exchange.key is not None and exchange.key.name:
                self.metrics.key_requests.labels(exchange.key.name, str(exchange.status)).inc()

        bounds = Bounds(
            deadline_seconds=self.config.deadline_seconds,
            max_body_bytes=self.config.max_body_bytes,
            pace=pace_of(self.config.http),
        )
        return Endpoint(partial(self._handle, path), self.admission, bounds, on_start=start, on_end=count)

    def _begin_trace(self, trail: Trail, exchange: Exchange, path: str) -> None:
        """Give a request a span of its own, if spans are exported, and note its trace for the log."""
        if self.tracing is not None:
            trail.trace = self.tracing.begin(trail.client_trace, path)
        if trail.trace is not None:
            exchange.visit.details["trace_id"] = trail.trace.trace_id_text

    async def _handle(self, path: str, exchange: Exchange) -> None:
        started = time.perf_counter()
        timing = Timing()
        trail = self.records.trail_of(exchange)
        trail.passed("read")
        try:
            request = await self._parsed(exchange, _PARSERS.get(path, partial(parse_other, path=path)))
            request = self._of_tenant(request, exchange, path)
            trail.passed("parse")
            job = Job(exchange, path, request, timing, trail)
            if exchange.key is not None:
                job.client = exchange.key.id
            try:
                await (self.router.answer if path in _PARSERS else self.router.pass_on)(job, started)
            except RefusedError as error:
                if exchange.has_begun:
                    raise
                await job.send_response(error.response)
        except BaseException:
            exchange.error_headers = [timing.header()]
            raise
        finally:
            exchange.visit.stages = stages_at_end(timing.durations(), trail, exchange.visit)

    def _of_tenant(self, request: Request, exchange: Exchange, path: str) -> Request:
        """Return the request with its tenant's salt, if it has one. Raises InvalidRequestError for what isn't kept apart."""
        if exchange.key is not None and exchange.key.tenant_secret:
            request = of_tenant(request, exchange.key.tenant_secret, of="key")
        elif self.config.tenant_by is TenantBy.AUTHORIZATION:
            request = of_tenant(request, exchange.headers.get("authorization", ""), of="authorization")
        else:
            return request
        return request if path in _PARSERS else kept_apart(path, request)

    async def _parsed(self, exchange: Exchange, parse: Callable[[bytes, int], Request]) -> Request:
        """Return what the proxy reads of the body; a large one is checked and parsed beside the event loop."""
        body, exchange.body = exchange.body, b""
        if len(body) <= INLINE_BYTES:
            return parse(body, self.config.http.max_text_bytes)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._parsers, parse, body, self.config.http.max_text_bytes)


def _stopping() -> OverloadedError:
    return OverloadedError("The proxy is shutting down; try again.", code=Code.STOPPING)
