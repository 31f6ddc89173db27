"""Counts the bytes of request bodies that reach an instance: a server in front of it that passes everything on."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
from aiohttp import web

from chiasm.bench.client import CHAT

_MOST_BYTES = 256 << 20
_CHUNK_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=300)
_HOP_BY_HOP = frozenset(
    ("connection", "content-length", "expect", "host", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade")
)
"""Headers that are about one connection; each side has its own."""


class Counter:
    """What has passed so far, of chat completions alone: probes and metrics are not counted."""

    def __init__(self, target: str, session: aiohttp.ClientSession) -> None:
        self.url = ""
        """Where to send what ``target`` is to get."""
        self.requests = 0
        self.body_bytes = 0
        """Of the bodies as they came over the wire, headers and chunk sizes left out."""
        self._target = target
        self._session = session

    async def pass_on(self, request: web.Request) -> web.StreamResponse:
        """Send the request to the target, and its answer back as it comes."""
        body = await request.read()
        if request.method == "POST" and request.path == CHAT:
            self.requests += 1
            self.body_bytes += len(body)
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP_BY_HOP}
        try:
            async with self._session.request(
                request.method, self._target + request.path_qs, data=body or None, headers=headers
            ) as answer:
                reply = web.StreamResponse(status=answer.status)
                reply.headers.extend(
                    (name, value) for name, value in answer.headers.items() if name.lower() not in _HOP_BY_HOP
                )
                await reply.prepare(request)
                async for chunk in answer.content.iter_any():
                    await reply.write(chunk)
                await reply.write_eof()
                return reply
        except aiohttp.ClientConnectorError as error:
            raise web.HTTPBadGateway(text=f"{self._target} could not be reached: {error}") from error


@asynccontextmanager
async def counting(target: str) -> AsyncIterator[Counter]:
    """A counter in front of the instance at base URL ``target``, on a free port of this machine."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        connector=connector, timeout=_CHUNK_TIMEOUT, auto_decompress=False, trust_env=False
    ) as session:
        counter = Counter(target, session)
        app = web.Application(client_max_size=_MOST_BYTES)
        app.router.add_route("*", "/{path:.*}", counter.pass_on)
        # A proxy that goes away ends its requests to the instance too.
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            counter.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            yield counter
        finally:
            await runner.cleanup()
