"""Streams that run while something else goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import web

from chiasm.bench.client import RequestFailedError, opened
from chiasm.bench.measurement import Bench
from chiasm.bench.streams import gaps_meanwhile

_EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'


@dataclass
class _Server:
    """Answers with so many tokens, and with 503 after so many requests."""

    tokens: int
    failing_after: int = 1000
    enough: int = 1000
    url: str = ""
    came: list[str] = field(default_factory=list)
    """The texts of all requests."""
    had_enough: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when ``enough`` requests have been answered."""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.came.append((await request.json())["messages"][0]["content"])
        number = len(self.came)
        reply = web.StreamResponse(status=200 if number <= self.failing_after else 503)
        await reply.prepare(request)
        for _ in range(self.tokens):
            await reply.write(_EVENT)
            await asyncio.sleep(0.001)
        if number >= self.enough:
            self.had_enough.set()
        return reply


@asynccontextmanager
async def _running(server: _Server, folder: Path) -> AsyncIterator[Bench]:
    app = web.Application()
    app.router.add_post("/v1/chat/completions", server.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        async with opened() as client:
            yield Bench("m", folder, client)
    finally:
        await runner.cleanup()


async def test_gaps_of_all_streams_are_collected_while_the_other_thing_goes_on(tmp_path: Path) -> None:
    server = _Server(tokens=5, enough=8)
    async with _running(server, tmp_path) as bench:
        gaps = await gaps_meanwhile(bench, server.url, ["one", "two"], server.had_enough.wait, max_tokens=5)
    assert set(server.came) == {"one", "two"}
    assert len(gaps) >= 4 * 4  # eight streams, of which two began before and two run still
    assert all(gap >= 0 for gap in gaps)


async def test_the_other_thing_begins_when_all_streams_have_a_token(tmp_path: Path) -> None:
    server = _Server(tokens=200)
    came_before: list[set[str]] = []

    async def note() -> None:
        came_before.append(set(server.came))

    async with _running(server, tmp_path) as bench:
        await gaps_meanwhile(bench, server.url, ["one", "two", "three"], note, max_tokens=200)
    assert came_before == [{"one", "two", "three"}]


async def test_a_stream_that_fails_at_once_ends_it(tmp_path: Path) -> None:
    server = _Server(tokens=2, failing_after=0)
    async with _running(server, tmp_path) as bench:
        with pytest.raises(RequestFailedError, match="503"):
            await gaps_meanwhile(bench, server.url, ["one"], lambda: asyncio.sleep(60), max_tokens=2)


async def test_a_stream_that_fails_later_is_told_at_the_end(tmp_path: Path) -> None:
    server = _Server(tokens=2, failing_after=2, enough=3)
    async with _running(server, tmp_path) as bench:

        async def until_it_failed() -> None:
            await server.had_enough.wait()
            await asyncio.sleep(0.05)

        with pytest.raises(RequestFailedError, match="503"):
            await gaps_meanwhile(bench, server.url, ["one"], until_it_failed, max_tokens=2)
