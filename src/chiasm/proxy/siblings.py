"""Several workers of one proxy: what is told to one of them is told to all, and what one is asked about all is put together.

Each worker is a proxy of its own, with a socket in a folder that only their user can enter. Over these sockets a worker repeats
what changes the fleet, and collects the metrics and the records of the others; one that is started again asks another one what
it has missed. A request that comes from a sibling says so in a header, and goes no further.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import msgspec
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from chiasm.errors import ChiasmError, ConfigurationError, PathNotFoundError
from chiasm.http import json_response
from chiasm.http.answer import read_beginning
from chiasm.http.body import ClientLeftError, read_body, replayed
from chiasm.http.errors import error_response
from chiasm.wire import INSTANCES_PATH, LEASE_PATH, MEMBERS_PATH, UNREADABLE, WORKER_HEADER, Members

_REPEATED = (INSTANCES_PATH, LEASE_PATH)
_METHODS = ("POST", "DELETE")
_MAX_BODY_BYTES = 64 << 10
_MAX_PAGE_BYTES = 16 << 20
_PAGE_SECONDS = 2.0
_CONNECT_SECONDS = 1.0
_NOT_PASSED_ON = frozenset(
    {"host", "origin", "sec-fetch-site", "content-length", "content-encoding", "transfer-encoding", "connection"}
)
_KEY = "chiasm.sibling"
_members = msgspec.json.Decoder(Members)
_SAMPLE = re.compile(rb"([a-zA-Z_:][\w:]*)(\{)?")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Worker:
    """One worker of a proxy that has several."""

    number: int
    """From 0."""
    count: int
    """How many there are."""
    folder: Path
    """Where their sockets are."""

    def bind(self) -> socket.socket:
        """Return the socket at which this worker's siblings reach it; one that a worker left behind before is replaced.

        Raises ConfigurationError if there can be none.
        """
        path = self._path(self.number)
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(str(path))
        except OSError as error:
            listener.close()
            raise ConfigurationError(
                f"The socket {path} can't be made: {error}. Name a folder with a short path for temporary files, with TMPDIR."
            ) from error
        listener.listen()
        return listener

    def begin(self) -> bool:
        """Note that this worker runs; return whether one of its number did so before, which has ended."""
        mark = self.folder / f"{self.number}.begun"
        has_predecessor = mark.exists()
        mark.touch()
        return has_predecessor

    @property
    def siblings(self) -> dict[int, Path]:
        """The sockets of the others, by their numbers."""
        return {number: self._path(number) for number in range(self.count) if number != self.number}

    def _path(self, number: int) -> Path:
        return self.folder / f"{number}.sock"


class Siblings:
    """The other workers, as one of them reaches them, on its event loop."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._number = worker.number
        self._sessions: dict[int, aiohttp.ClientSession] = {}

    def open(self) -> None:
        """Make what reaches them; nothing is sent yet."""
        self._sessions = {
            number: aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(path=str(path), limit=0),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS),
                trust_env=False,
            )
            for number, path in self._worker.siblings.items()
        }

    async def close(self) -> None:
        for session in self._sessions.values():
            await session.close()

    async def missed(self) -> Members | None:
        """Return what another worker knows of the fleet, if this one is started again; None if none of them answers.

        What changes from then on waits at this worker's socket, which is open already.
        """
        if not self._worker.begin():
            return None
        for number in self._sessions:
            page = await self._page(number, MEMBERS_PATH, {WORKER_HEADER: ""})
            try:
                if page is not None:
                    return _members.decode(page)
            except UNREADABLE as error:
                _logger.warning("worker %d doesn't tell what it knows of the fleet: %s", number, error)
        return None

    async def pages(self, scope: Scope, path: str) -> dict[int, bytes | None]:
        """Return what each sibling answers to GET ``path``, by its number; None if it doesn't.

        Each of them checks for itself who asks: the client of the request that ``scope`` is of, with its headers.
        """
        headers = _asked_by(scope)
        pages = await asyncio.gather(*(self._page(number, path, headers) for number in self._sessions))
        return dict(zip(self._sessions, pages, strict=True))

    async def metrics(self, own: bytes, scope: Scope) -> bytes:
        """Return the metrics of all workers on one page; ``own`` are this one's. One that doesn't answer is left out."""
        pages = {self._number: own, **await self.pages(scope, "/metrics")}
        return merged({str(number): page for number, page in sorted(pages.items()) if page is not None})

    async def _page(self, number: int, path: str, headers: Mapping[str, str]) -> bytes | None:
        """Return what a sibling answers; None if it doesn't."""
        try:
            async with asyncio.timeout(_PAGE_SECONDS):
                async with self._sessions[number].get(f"http://worker{path}", headers=headers) as response:
                    if response.status != 200:
                        _logger.warning("worker %d answers %s with status %d", number, path, response.status)
                        return None
                    page = await read_beginning(response, _MAX_PAGE_BYTES + 1)
                    if len(page) <= _MAX_PAGE_BYTES:
                        return page
                    _logger.warning("worker %d answers %s with more than %d bytes", number, path, _MAX_PAGE_BYTES)
                    return None
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            _logger.warning("worker %d doesn't answer %s: %s", number, path, error or type(error).__name__)
            return None

    async def repeat(self, scope: Scope, body: bytes) -> None:
        """Send all siblings a request, and wait for their answers, which this worker's own stands for."""
        kept = _asked_by(scope)
        method, path = scope["method"], scope["path"]
        await asyncio.gather(*(self._repeat(number, method, path, kept, body) for number in self._sessions))

    async def _repeat(self, number: int, method: str, path: str, headers: Mapping[str, str], body: bytes) -> None:
        try:
            async with self._sessions[number].request(
                method, f"http://worker{path}", headers=headers, data=body
            ) as response:
                await response.read()
        except (aiohttp.ClientError, OSError) as error:  # a worker that is started again asks
            _logger.warning("worker %d wasn't told of %s %s: %s", number, method, path, error)


class Repeater:
    """Repeats what changes the fleet to all siblings, while it is answered here.

    Each of them checks for itself who asks: it is told the address of the client.
    """

    def __init__(self, app: ASGIApp, siblings: Siblings) -> None:
        self._app = app
        self._siblings = siblings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if not scope.get("client") and WORKER_HEADER in headers:  # it has come through the folder of the workers
            client = headers[WORKER_HEADER]
            await self._app({**scope, _KEY: True, "client": (client, 0) if client else None}, receive, send)
            return
        if scope["method"] not in _METHODS or scope["path"] not in _REPEATED:
            await self._app(scope, receive, send)
            return
        try:
            body = await read_body(receive, headers, _MAX_BODY_BYTES)
        except ClientLeftError:
            return
        except ChiasmError as error:
            await error_response(error)(scope, receive, send)
            return
        repeating = asyncio.create_task(self._siblings.repeat(scope, body))
        try:
            await self._app(_without_encoding(scope), replayed(body, receive), send)
            await asyncio.wait((repeating,), timeout=_PAGE_SECONDS)
        finally:
            repeating.cancel()


def members_route(members: Callable[[], Members]) -> Route:
    """Return the route at which siblings are told what this worker knows of the fleet."""

    async def handle(request: Request) -> Response:
        if not is_from_sibling(request.scope):
            raise PathNotFoundError(f"{MEMBERS_PATH} is for the workers of this proxy alone.")
        return json_response(members())

    return Route(MEMBERS_PATH, handle)


def is_from_sibling(scope: Scope) -> bool:
    """Return whether another worker sends a request."""
    return _KEY in scope


def merged(pages: Mapping[str, bytes]) -> bytes:
    """Return pages of metrics as one: each sample has the label ``worker``, and each metric stands in one place."""
    families: dict[bytes, list[bytes]] = {}
    for worker, page in pages.items():
        label = b'worker="%b"' % worker.encode()
        name = b""
        for line in page.splitlines():
            if line.startswith(b"# "):
                name = line.split(b" ", 3)[2]
                about = families.setdefault(name, [])
                if line not in about:
                    about.append(line)
            elif found := _SAMPLE.match(line):
                rest = line[found.end() :]
                sample = b"%b{%b,%b" if found[2] else b"%b{%b}%b"
                families.setdefault(name, []).append(sample % (found[1], label, rest))
    return b"".join(b"%b\n" % line for lines in families.values() for line in lines)


def _asked_by(scope: Scope) -> dict[str, str]:
    """Return the headers by which a sibling knows who asks."""
    kept = {name: value for name, value in Headers(scope=scope).items() if name not in _NOT_PASSED_ON}
    return kept | {WORKER_HEADER: scope["client"][0] if scope.get("client") else ""}


def _without_encoding(scope: Scope) -> Scope:
    fields = [(name, value) for name, value in scope["headers"] if name != b"content-encoding"]
    return {**scope, "headers": fields}
