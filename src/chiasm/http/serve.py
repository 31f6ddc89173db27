"""A server as a process: serves until a signal, then lets what runs end and ends within bounds."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import uvicorn

from chiasm.http.config import HttpConfig
from chiasm.http.connection import SECONDS_TO_READ, Connection
from chiasm.http.connections import Connections
from chiasm.http.descriptors import raise_descriptor_limit, room_for_connections
from chiasm.http.limits import Refusals
from chiasm.http.listen import BACKLOG, url_of
from chiasm.http.shutdown import Shutdown
from chiasm.http.tls import certificate_of
from chiasm.http.tls_listener import TlsListener

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""They ask for the end. SIGHUP doesn't where it is ignored, as with nohup."""
_KEEP_ALIVE_SECONDS = 75
"""Longer than clients keep idle connections in their pools, so that clients close them and no request meets a closed one."""
_CLOSE_SECONDS = 1
"""Time for connections to close once their requests have been interrupted."""


class HttpServer(uvicorn.Server):
    """uvicorn's server around an application; SIGINT, SIGTERM, SIGHUP or ``stop`` end it, quietly and with exit code 0.

    It listens until nothing runs anymore, so that the application can refuse what is new and say that it is stopping, and
    until clients that read slowly have the ends of their answers, at most for SECONDS_TO_READ.
    """

    def __init__(
        self,
        app: Any,
        config: HttpConfig,
        refusals: Refusals,
        *,
        shutdown_timeout_seconds: float,
        on_stop: Callable[[], None],
        is_idle: Callable[[], bool],
        interrupt_all: Callable[[], None],
        has_parent: bool = False,
    ) -> None:
        """``refusals`` counts connections and requests that are refused before the application sees them. Raises
        ConfigurationError for a certificate that can't be used.

        At the end ``on_stop`` is called at once: from then on the application refuses what is new. ``interrupt_all`` ends
        what still runs when ``is_idle`` hasn't returned true within ``shutdown_timeout_seconds``, or at a second signal.

        With ``has_parent`` a process of chiasm asks this one to end, by SIGTERM, and hurries it by SIGINT. Then SIGTERM counts
        once: systemd sends it to all processes of a service, beside the parent."""
        self._connections = Connections(config, refusals)
        self._certificate = certificate_of(config)
        self._following: asyncio.Task[None] | None = None
        self.scheme = config.scheme
        super().__init__(
            uvicorn.Config(
                app,
                loop="uvloop",
                http=partial(Connection, self._connections),  # type: ignore[arg-type]
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=_CLOSE_SECONDS,
                backlog=BACKLOG,
            )
        )
        self.ready = asyncio.Event()
        """Set when requests are taken."""
        self._shutdown = Shutdown(shutdown_timeout_seconds)
        self._on_stop = on_stop
        self._is_idle = is_idle
        self._interrupt_all = interrupt_all
        self._has_parent = has_parent
        self._loop: asyncio.AbstractEventLoop | None = None

    def stop(self) -> None:
        """End; the second call ends what runs at once. Call it on the server's event loop."""
        self._on_stop()
        self.should_exit = True
        self._shutdown.ask()

    def drain(self) -> None:
        """End when nothing runs any more, however long that takes. Call it on the server's event loop."""
        self._on_stop()
        self._shutdown.drain()

    def stop_from_thread(self) -> None:
        """End; call it from any thread."""
        self.should_exit = True
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: it has ended already
                self._loop.call_soon_threadsafe(self.stop)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._connections.reduce_to(room_for_connections(raise_descriptor_limit()))
        await super().startup([])
        for listener in sockets or []:
            self.servers.append(await self._listen(listener))
        if self._certificate is not None:
            self._following = asyncio.create_task(self._certificate.follow())
        self.ready.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._following is not None:
            self._following.cancel()
        await super().shutdown(sockets)

    async def _listen(self, listener: socket.socket) -> asyncio.Server:
        """Take connections as the base class does, except that those whose handshake of TLS is under way count as well."""
        make = partial(
            Connection,
            self._connections,
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
        )
        if listener.family == socket.AF_UNIX:
            return await asyncio.get_running_loop().create_unix_server(make, sock=listener, backlog=BACKLOG)
        if self._certificate is not None:
            tls = TlsListener(listener, self._connections, self._certificate.context, lambda one: make(handshake=one))
            return cast("asyncio.Server", tls)
        return await asyncio.get_running_loop().create_server(make, sock=listener, backlog=BACKLOG)

    async def main_loop(self) -> None:
        while not await self._shutdown.asked(1.0):
            await self.on_tick(0)
            self._connections.end_late_ones()
        await self._shutdown.drained(self._is_idle)
        self._interrupt_all()
        await self._shutdown.drained(lambda: not self._connections.are_sending, SECONDS_TO_READ)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Unlike the base class's, does not raise the signal again at the end: the process ends with exit code 0."""
        if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
            yield
            return
        loop = asyncio.get_running_loop()
        awaited = [one for one in _SIGNALS if one is not signal.SIGHUP or signal.getsignal(one) is not signal.SIG_IGN]
        for number in awaited:
            loop.add_signal_handler(number, self._note_signal, number)
        try:
            yield
        finally:
            for number in awaited:
                loop.remove_signal_handler(number)

    def _note_signal(self, number: signal.Signals) -> None:
        if not (self._has_parent and self.should_exit and number == signal.SIGTERM):
            self.stop()


def run(
    server: HttpServer, listener: socket.socket, *others: socket.socket, on_ready: Callable[[str], None] | None = None
) -> None:
    """Serve on listening sockets until SIGTERM or SIGINT; call it on the main thread.

    ``on_ready`` is called once with the base URL of the first one when requests are taken.
    """

    async def serve() -> None:
        serving = asyncio.ensure_future(server.serve(sockets=[listener, *others]))
        waiting = asyncio.ensure_future(server.ready.wait())
        await asyncio.wait((serving, waiting), return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        try:
            if server.ready.is_set() and on_ready is not None:
                on_ready(url_of(listener, server.scheme))
        except OSError:  # nobody can be told
            server.stop()
            raise
        finally:
            await serving

    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
        runner.run(serve())
