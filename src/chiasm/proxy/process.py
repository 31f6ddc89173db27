"""Runs the proxy as a process."""

from __future__ import annotations

import gc
import socket
from collections.abc import Callable

from starlette.applications import Starlette

from chiasm.heap import recycle_large_buffers
from chiasm.http.listen import bind
from chiasm.http.serve import HttpServer
from chiasm.http.serve import run as serve
from chiasm.proxy.app import create_app
from chiasm.proxy.config import ProxyConfig
from chiasm.proxy.service import ProxyService
from chiasm.proxy.siblings import Worker

_KEPT_BYTES = 16 << 20
_ARENAS = 2


def run(
    config: ProxyConfig,
    *,
    on_ready: Callable[[str], None] | None = None,
    worker: Worker | None = None,
    listener: socket.socket | None = None,
    has_parent: bool = False,
) -> None:
    """Serve until SIGTERM or SIGINT, then until nothing runs; call it on the main thread.

    What runs has ``config.shutdown_timeout_seconds`` to end, or until a second signal; then it ends with an error.

    ``on_ready`` is called once with the base URL, when requests are taken and each instance has been probed once. Raises
    ConfigurationError if the address cannot be bound, or the shared cache can't be used. A ``worker`` of several is given the
    socket that all of them listen on. With ``has_parent`` a process of chiasm asks this one to end.
    """
    recycle_large_buffers(kept_bytes=_KEPT_BYTES, arenas=_ARENAS)
    listener = listener or bind(config.host, config.port)
    among_workers = [] if worker is None else [worker.bind()]
    server = create_server(create_app(config, worker=worker), config, has_parent=has_parent)
    gc.collect()
    gc.freeze()  # a collection that walks over all modules would hold the event loop
    serve(server, listener, *among_workers, on_ready=on_ready)


def create_server(app: Starlette, config: ProxyConfig, *, has_parent: bool = False) -> HttpServer:
    """Return a server around the proxy's application."""
    service: ProxyService = app.state.service
    return HttpServer(
        app,
        config.http,
        service.metrics.refusals,
        shutdown_timeout_seconds=config.shutdown_timeout_seconds,
        on_stop=service.stop,
        is_idle=lambda: not service.admission.requests,
        interrupt_all=service.interrupt_all,
        has_parent=has_parent,
    )
