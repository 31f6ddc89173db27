"""Runs the proxy as a process."""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn
from aiohttp.abc import AbstractResolver

from chiasm.errors import ConfigurationError
from chiasm.proxy.app import create_app
from chiasm.proxy.config import ProxyConfig
from chiasm.proxy.gateway import Gateway
from chiasm.proxy.memory import recycle_large_buffers

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_BACKLOG = 2048
_KEEP_ALIVE_SECONDS = 30
"""Longer than clients keep idle connections, so that a request isn't sent on one that is just being closed."""


def run(
    config: ProxyConfig, *, on_ready: Callable[[str], None] | None = None, sock: socket.socket | None = None
) -> None:
    """Serve until SIGTERM or SIGINT, then return within ``config.shutdown_seconds`` and one. Call it on the main thread.

    ``sock`` is a bound socket to listen on, in place of the config's host and port. ``on_ready`` is called once with the
    base URL when connections are taken and each instance has been asked once. Raises ConfigurationError if the address
    cannot be bound.
    """
    recycle_large_buffers()
    listener = sock or bind(config.host, config.port)
    server = ProxyServer(config)

    async def serve() -> None:
        serving = asyncio.ensure_future(server.serve(sockets=[listener]))
        waiting = asyncio.ensure_future(server.ready.wait())
        await asyncio.wait((serving, waiting), return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if server.ready.is_set() and on_ready is not None:
            on_ready(url_of(listener))
        await serving

    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
        runner.run(serve())


class ProxyServer(uvicorn.Server):
    """uvicorn's server around the proxy: ends at once on a signal or ``stop``, and tells when it is ready."""

    def __init__(self, config: ProxyConfig, *, resolver: AbstractResolver | None = None) -> None:
        app = create_app(config, resolver=resolver)
        self.gateway: Gateway = app.state.gateway
        super().__init__(
            uvicorn.Config(
                app,
                loop="uvloop",
                http="httptools",
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=math.ceil(config.shutdown_seconds) + 1,
                backlog=_BACKLOG,
            )
        )
        self._shutdown_seconds = config.shutdown_seconds
        self.ready = asyncio.Event()
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        self.should_exit = True
        self._stopping.set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()

    async def main_loop(self) -> None:
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), timeout=1.0)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(self._shutdown_seconds, self.gateway.end_requests)
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Unlike the base class's, doesn't raise the signal again at the end: the process ends with exit code 0."""
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self.stop)
        try:
            yield
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)


def url_of(listener: socket.socket) -> str:
    """The base URL of what listens on this socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to this address. Raises ConfigurationError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ConfigurationError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    return listener
