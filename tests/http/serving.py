"""A server of ``chiasm.http`` in a thread, around one handler."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from chiasm.errors import ChiasmError
from chiasm.http import Admission, Endpoint, Exchange
from chiasm.http.config import HttpConfig
from chiasm.http.endpoint import Bounds, Handler
from chiasm.http.front import FrontDoor
from chiasm.http.limits import Refusals
from chiasm.http.listen import bind, url_of
from chiasm.http.serve import HttpServer

DEFAULT = HttpConfig()
BOUNDS = Bounds(deadline_seconds=20, max_body_bytes=1000)


@dataclass
class Site:
    """A running server and what it noted."""

    url: str
    admission: Admission
    loop: asyncio.AbstractEventLoop
    ended: list[int | None] = field(default_factory=list)
    """The status of every request, in the order in which they ended."""
    errors: list[ChiasmError] = field(default_factory=list)


async def page(request: Request) -> Response:
    return Response(b"page")


@contextmanager
def site(
    handler: Handler,
    bounds: Bounds = BOUNDS,
    *,
    max_requests: int = 10,
    max_held_bytes: int = 10_000,
    config: HttpConfig = DEFAULT,
    is_local: bool = False,
) -> Iterator[Site]:
    """Serve the handler for POST under ``/`` and two paths like those of the API, and a page for GET under ``/page``."""
    refusals = Refusals()
    admission = Admission(max_requests, max_held_bytes, config, refusals)
    listener = bind("127.0.0.1", 0)
    found: list[Site] = []
    started = threading.Event()

    def on_error(exchange: Exchange, error: ChiasmError) -> None:
        exchange.error_headers = [("x-noted", "yes")]
        found[0].errors.append(error)

    endpoint = Endpoint(
        handler,
        admission,
        bounds,
        on_error=on_error,
        on_end=lambda exchange: found[0].ended.append(exchange.status),
    )
    paths = ("/", "/v1/chat/completions", "/v1/completions")
    app = FrontDoor(
        [*(Route(path, endpoint, methods=["POST"]) for path in paths), Route("/page", page), Route("/v1/models", page)],
        config,
        is_local=is_local,
        refusals=refusals,
    )
    servers: list[HttpServer] = []

    async def serve() -> None:
        server = HttpServer(
            app,
            config,
            refusals,
            shutdown_timeout_seconds=0.2,
            on_stop=lambda: None,
            is_idle=lambda: True,
            interrupt_all=lambda: None,
        )
        servers.append(server)
        found.append(Site(url_of(listener, server.scheme), admission, asyncio.get_running_loop()))
        waiting = asyncio.ensure_future(server.ready.wait())
        waiting.add_done_callback(lambda task: started.set())
        await server.serve(sockets=[listener])

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        assert started.wait(20)
        yield found[0]
    finally:
        servers[0].stop_from_thread()
        thread.join()
