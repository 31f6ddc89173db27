"""The routes of an instance, and what is measured of every request."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from chiasm.errors import ChiasmError, NotServedError
from chiasm.http import Endpoint, Exchange
from chiasm.http.body import pace_of
from chiasm.http.endpoint import Bounds
from chiasm.http.fleet_calls import FleetGuard
from chiasm.http.front import FrontDoor
from chiasm.http.listen import is_loopback
from chiasm.http.liveness import live
from chiasm.http.timing import TimingEntry, write_timing
from chiasm.server.completions import chat_completions, completions
from chiasm.server.config import ServerConfig
from chiasm.server.context import ServerContext
from chiasm.server.drain import drain
from chiasm.server.kv_release import release_kv
from chiasm.server.losses import tell_lost
from chiasm.server.places import note_places
from chiasm.server.status import Status
from chiasm.wire import (
    AWAITED_PATH,
    CHAT_PATH,
    COMPLETIONS_PATH,
    DRAIN_PATH,
    KV_RELEASE_PATH,
    LOST_PATH,
    OTHER_PATHS,
    PLACES_PATH,
)

if TYPE_CHECKING:
    from chiasm.engine.base import Engine

_GRACE_SECONDS = 1.0
"""Time after the deadline for the engine to raise its own error, which says what was late."""


def create_app(engine: Engine, *, served_model_name: str, config: ServerConfig | None = None) -> Starlette:
    """Return the API of an instance whose engine has been started; the caller stops the engine."""
    return app_of(ServerContext(served_model_name, config or ServerConfig(), engine))


def app_of(context: ServerContext) -> Starlette:
    """Return the API of an instance in any state."""
    status = Status(context)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with context.opened():
            yield

    return FrontDoor(
        [
            Route(CHAT_PATH, _endpoint(context, CHAT_PATH, chat_completions), methods=["POST"]),
            Route(COMPLETIONS_PATH, _endpoint(context, COMPLETIONS_PATH, completions), methods=["POST"]),
            *(Route(path, _not_served, methods=["POST"]) for path in OTHER_PATHS),
            Route("/v1/models", status.models),
            Route("/v1/models/{name:path}", status.model),
            Route("/health", status.health),
            Route("/livez", live),
            Route("/readyz", status.ready),
            Route(AWAITED_PATH, status.awaited),
            Route(LOST_PATH, partial(tell_lost, context), methods=["POST"]),
            Route(DRAIN_PATH, partial(drain, context), methods=["POST"]),
            Route(PLACES_PATH, partial(note_places, context), methods=["POST"]),
            Route(KV_RELEASE_PATH, partial(release_kv, context), methods=["POST"]),
            Route("/metrics", status.metrics),
            Route("/version", status.version),
        ],
        context.config.http,
        lifespan=lifespan,
        is_local=is_loopback(context.config.host),
        guard=partial(FleetGuard, key=context.fleet_key),
        refusals=context.metrics.refusals,
    )


async def _not_served(request: Request) -> Response:
    raise NotServedError(request.scope["path"])


def _endpoint(
    context: ServerContext, path: str, handler: Callable[[ServerContext, Exchange], Awaitable[None]]
) -> Endpoint:
    config, metrics = context.config, context.metrics

    def on_start(exchange: Exchange) -> None:
        metrics.in_flight.inc()
        context.check_ready()

    def on_error(exchange: Exchange, error: ChiasmError) -> None:
        if exchange.is_streaming:
            metrics.stream_errors.inc()
        total = TimingEntry("total", time.monotonic() - exchange.arrival)
        exchange.error_headers = [("server-timing", write_timing([*exchange.timing, total]))]

    def on_end(exchange: Exchange) -> None:
        metrics.in_flight.dec()
        metrics.requests.labels(path, str(exchange.status)).inc()
        metrics.end_to_end.labels(path).observe(time.monotonic() - exchange.arrival)

    return Endpoint(
        partial(handler, context),
        context.admission,
        Bounds(
            deadline_seconds=config.deadline_seconds,
            max_body_bytes=config.max_body_bytes,
            pace=pace_of(config.http),
            grace_seconds=_GRACE_SECONDS,
        ),
        on_start=on_start,
        on_error=on_error,
        on_end=on_end,
    )
