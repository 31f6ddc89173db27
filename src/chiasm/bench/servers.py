"""Servers that no deployment has: commands that answer GET /health, more proxies, and one that counts what it passes on."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp
from aiohttp import web

from chiasm.bench.measurement import Bench
from chiasm.errors import ChiasmError
from chiasm.launch import Deployment, DeploymentNotReadyError, ProcessState
from chiasm.launch.child import Child
from chiasm.launch.plan import plan_proxy
from chiasm.launch.ports import HeldPort
from chiasm.wire import CHAT_PATH, Role

PROXY_READY_SECONDS = 60.0
_POLL_SECONDS = 0.05
_STOP_SECONDS = 5.0
_KILL_SECONDS = 2.0
_LINES_SHOWN = 5


@dataclass(frozen=True)
class Command:
    """One server, as a person would start it."""

    name: str
    arguments: Sequence[str]
    """The server prints ``ready`` on its standard output, and ends with its standard input; see ``supervised``."""
    environment: Mapping[str, str]
    configuration: str = ""
    """A line for its standard input, if it takes one."""


def supervised(url: str, arguments: Sequence[str]) -> list[str]:
    """Return a command that runs a server which does neither, under a supervisor; it is ready when it answers at ``url``."""
    return [sys.executable, "-m", "chiasm.launch.supervisor", "--url", url, "--", *arguments]


@asynccontextmanager
async def served(bench: Bench, *commands: Command, ready_seconds: float) -> AsyncIterator[None]:
    """Run servers, from when all are ready, and end them in any case.

    Raises ConfigurationError, DeploymentNotReadyError, and at the end ChiasmError if a server was restarted meanwhile,
    because the measurement is then worthless.
    """
    children = [
        Child(
            one.name,
            one.arguments,
            dict(one.environment),
            configuration=one.configuration,
            on_change=_ignore,
            on_line=_ignore,
        )
        for one in commands
    ]
    try:
        for child in children:
            child.start()
        await _ready(bench, children, ready_seconds)
        yield
        if died := [child.name for child in children if child.restarts or child.state is not ProcessState.READY]:
            raise ChiasmError(f"{', '.join(died)} died during the measurement: {_last_lines(children)}")
    finally:
        await asyncio.shield(asyncio.to_thread(_end, children))


async def _ready(bench: Bench, children: Sequence[Child], seconds: float) -> None:
    until = time.monotonic() + seconds
    while waiting := [child.name for child in children if child.state is not ProcessState.READY]:
        for child in children:
            if child.failure is not None:
                raise child.failure
        if time.monotonic() > until:
            raise DeploymentNotReadyError(
                f"{', '.join(waiting)} not ready after {seconds:g} s; last lines: {_last_lines(children)}"
            )
        bench.phase(f"starting {waiting[0]}")
        await asyncio.sleep(_POLL_SECONDS)


def _end(children: Sequence[Child]) -> None:
    for child in children:
        child.end(at_once=True)
    until = time.monotonic() + _STOP_SECONDS
    for child in children:
        if not child.join(max(0.0, until - time.monotonic())):
            child.kill()
            child.join(_KILL_SECONDS)


def _last_lines(children: Sequence[Child]) -> str:
    return " | ".join(line for child in children for line in list(child.lines)[-_LINES_SHOWN:])


def _ignore(*_: object) -> None:
    pass


@asynccontextmanager
async def chiasm_proxy(bench: Bench, deployment: Deployment, pd: str) -> AsyncIterator[str]:
    """One more proxy of chiasm in front of a deployment's encoders, and of ``pd`` instead of its PDs; gives its URL."""
    address = HeldPort(deployment.config.host)
    urls = [*((Role.ENCODER, url) for url in deployment.urls(Role.ENCODER)), (Role.PD, pd)]
    plan = plan_proxy(deployment.config, address, urls)
    command = Command(
        "chiasm's proxy", plan.command, plan.environment | deployment.fleet_key.environment(), plan.configuration
    )
    try:
        async with served(bench, command, ready_seconds=PROXY_READY_SECONDS):
            yield address.url
    finally:
        address.release()


# ---- counting ----------------------------------------------------------------------------------------------------------

_MOST_BYTES = 256 << 20
_CHUNK_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=300)
_HOP_BY_HOP = frozenset(
    ("connection", "content-length", "expect", "host", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade")
)
"""Headers that describe one connection; each side has its own."""


class Counter:
    """What has passed so far. Only chat completions are counted, not probes or metrics."""

    def __init__(self, target: str, session: aiohttp.ClientSession) -> None:
        self.url = ""
        """Where to send requests to ``target``."""
        self.requests = 0
        self.body_bytes = 0
        """Size of the bodies, without headers and chunk sizes."""
        self._target = target
        self._session = session

    async def forward(self, request: web.Request) -> web.StreamResponse:
        """Send the request to the target, and stream the response back."""
        body = await request.read()
        if request.method == "POST" and request.path == CHAT_PATH:
            self.requests += 1
            self.body_bytes += len(body)
        url = self._target + request.path_qs
        headers = _end_to_end(request.headers)
        try:
            async with self._session.request(request.method, url, data=body or None, headers=headers) as upstream:
                response = web.StreamResponse(status=upstream.status)
                response.headers.extend(_end_to_end(upstream.headers))
                await response.prepare(request)
                async for chunk in upstream.content.iter_any():
                    await response.write(chunk)
                await response.write_eof()
                return response
        except aiohttp.ClientConnectorError as error:
            raise web.HTTPBadGateway(text=f"Cannot reach {self._target}: {error}") from error


def _end_to_end(headers: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(name, value) for name, value in headers.items() if name.lower() not in _HOP_BY_HOP]


@asynccontextmanager
async def counting(target: str) -> AsyncIterator[Counter]:
    """A counter in front of the instance at base URL ``target``, on a free port of this machine."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        connector=connector, timeout=_CHUNK_TIMEOUT, auto_decompress=False, trust_env=False
    ) as session:
        counter = Counter(target, session)
        app = web.Application(client_max_size=_MOST_BYTES)
        app.router.add_route("*", "/{path:.*}", counter.forward)
        # With handler_cancellation, a client that leaves ends its request to the instance too.
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            counter.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            yield counter
        finally:
            await runner.cleanup()
