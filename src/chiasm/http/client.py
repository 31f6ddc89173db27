"""Calls of other servers, where every microsecond counts: HTTP/1.1 over connections that stay open.

Of the CPU time that the proxy took for a text, half was aiohttp's client, and other libraries take as much (docs/measured.md).
The calls of instances need little of what these can: no redirections, cookies, encodings or proxies. All other calls go by
aiohttp.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import quote, urlsplit

import aiohappyeyeballs

from chiasm.http.client_connection import ClientConnection, Response
from chiasm.http.lookup import AddressInfo, resolve
from chiasm.http.trust import Trust

_LOOKUP_SECONDS = 10.0
"""How long the addresses of a name hold."""
_NEXT_ADDRESS_SECONDS = 0.25
"""After this time without a connection the next address is tried too, as RFC 8305 recommends."""
_SAFE = "/?%:@!$&'()*+,;=~-._"


class NoConnectionError(ConnectionError):
    """No connection could be made; the cause says why."""


class _Server(NamedTuple):
    """Where connections go."""

    host: str
    port: int
    is_tls: bool


class _Target(NamedTuple):
    """What a URL says."""

    server: _Server
    beginning: str
    """The rest of the request's first line, and the field with the host."""


class HttpClient:
    """Connections to any number of servers. Made and used on one event loop."""

    def __init__(
        self,
        *,
        connect_seconds: float,
        keep_seconds: float,
        prepare: Callable[[socket.socket], None],
        headers: Mapping[str, str],
    ) -> None:
        """Connections must be made in ``connect_seconds`` and stay open without work for ``keep_seconds``.

        ``prepare`` sets options of each socket; ``headers`` go with all requests.
        """
        self._connect_seconds = connect_seconds
        self._keep_seconds = keep_seconds
        self._prepare = prepare
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self._loop = asyncio.get_running_loop()
        self._free: dict[_Server, list[ClientConnection]] = {}
        """Those that wait for a request, the last used at the end."""
        self._all: set[ClientConnection] = set()
        self._addresses: dict[tuple[str, int], tuple[float, list[AddressInfo]]] = {}
        self._trust = Trust()
        self._closing_unused: asyncio.TimerHandle | None = None

    def close(self) -> None:
        """Break all connections off."""
        if self._closing_unused is not None:
            self._closing_unused.cancel()
        for connection in tuple(self._all):
            connection.abort()

    async def request(self, method: str, url: str, headers: Mapping[str, str], body: bytes = b"") -> Response:
        """Send a request, and return the response when its head has arrived.

        Raises NoConnectionError, another OSError if the connection is lost before that, ValueError if a header cannot be sent.
        """
        try:
            server, beginning = _target(url)
        except UnicodeError as error:
            raise NoConnectionError(f"{url} has a host that can be none") from error
        lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
        if lines.count("\n") != len(headers) or lines.count("\r") != len(headers) or "\0" in lines:
            raise ValueError("A header has a character that HTTP doesn't allow.")
        length = f"content-length: {len(body)}\r\n" if method == "POST" else ""
        head = f"{method} {beginning}{self._headers}{lines}{length}\r\n".encode()
        connection = self._unused(server)
        if connection is not None:
            try:
                return await connection.request(head, body)
            except ConnectionResetError:
                # The server may just have closed a connection that had no work. Only a question may be asked twice.
                if method != "GET":
                    raise
        return await (await self._connect(server)).request(head, body)

    # ---- connections -----------------------------------------------------------------------------------------------------

    def _unused(self, server: _Server) -> ClientConnection | None:
        free = self._free.get(server)
        if not free:
            return None
        connection = free.pop()
        if connection.free_since < self._loop.time() - self._keep_seconds:  # and so are the others
            self._close(connection, *free)
            return None
        return connection

    async def _connect(self, server: _Server) -> ClientConnection:
        """Raises NoConnectionError."""
        made: socket.socket | None = None
        try:
            async with asyncio.timeout(self._connect_seconds):
                made = await aiohappyeyeballs.start_connection(
                    await self._look_up(server.host, server.port),
                    happy_eyeballs_delay=_NEXT_ADDRESS_SECONDS,
                    interleave=1,
                )
                self._prepare(made)
                _, connection = await self._loop.create_connection(
                    lambda: ClientConnection(
                        lambda connection: self._keep(server, connection),
                        lambda connection: self._lose(server, connection),
                    ),
                    sock=made,
                    ssl=self._trust.context if server.is_tls else None,
                    server_hostname=server.host.rstrip(".") if server.is_tls else None,
                )
        except BaseException as error:
            if made is not None:
                made.close()
            self._trust.note(error)
            if isinstance(error, OSError | UnicodeError):
                raise NoConnectionError(f"no connection to {server.host}:{server.port}") from error
            raise
        if connection.lost_by is None:
            self._all.add(connection)
        return connection

    async def _look_up(self, host: str, port: int) -> list[AddressInfo]:
        until, found = self._addresses.get((host, port), (0.0, []))
        if until <= self._loop.time():
            found = await resolve(host, port)
            now = self._loop.time()
            self._addresses = {key: value for key, value in self._addresses.items() if value[0] > now}
            self._addresses[host, port] = (now + _LOOKUP_SECONDS, found)
        return found

    def _keep(self, server: _Server, connection: ClientConnection) -> None:
        self._free.setdefault(server, []).append(connection)
        if self._closing_unused is None:
            self._closing_unused = self._loop.call_later(self._keep_seconds, self._close_unused)

    def _lose(self, server: _Server, connection: ClientConnection) -> None:
        self._all.discard(connection)
        free = self._free.get(server)
        if free and connection in free:
            free.remove(connection)

    def _close_unused(self) -> None:
        oldest = self._loop.time() - self._keep_seconds
        for free in self._free.values():
            self._close(*(connection for connection in free if connection.free_since <= oldest))
        self._free = {server: free for server, free in self._free.items() if free}
        self._closing_unused = self._loop.call_later(self._keep_seconds, self._close_unused) if self._free else None

    def _close(self, *connections: ClientConnection) -> None:
        for connection in connections:
            connection.abort()


@lru_cache(maxsize=4096)
def _target(url: str) -> _Target:
    parts = urlsplit(url)
    is_tls = parts.scheme == "https"
    host = parts.hostname or ""
    path = quote(parts.path or "/", safe=_SAFE) + (f"?{quote(parts.query, safe=_SAFE)}" if parts.query else "")
    authority = parts.netloc.encode("idna").decode() if not parts.netloc.isascii() else parts.netloc
    server = _Server(host, parts.port or (443 if is_tls else 80), is_tls)
    return _Target(server, f"{path} HTTP/1.1\r\nHost: {authority}\r\n")
