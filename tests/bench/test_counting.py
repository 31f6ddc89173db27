"""The counting server in front of an instance, with real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import aiohttp
from aiohttp import web

from chiasm.bench.client import CHAT, opened
from chiasm.bench.counting import Counter, counting

_EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'


class _Instance:
    """Answers chat completions with what it was sent, or with a stream that waits until it is let go."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.headers: list[Mapping[str, str]] = []
        self.go_on = asyncio.Event()
        self.left = asyncio.Event()
        """Set when somebody has left a stream before its end."""

    async def chat(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(await request.read())
        self.headers.append(request.headers)
        if b"stream" not in self.bodies[-1]:
            return web.Response(body=self.bodies[-1], status=418, headers={"server-timing": "prefill;dur=2"})
        reply = web.StreamResponse()
        await reply.prepare(request)
        try:
            await reply.write(_EVENT)
            await self.go_on.wait()
            await reply.write(_EVENT)
        except asyncio.CancelledError:
            self.left.set()
            raise
        return reply

    async def health(self, request: web.Request) -> web.Response:
        return web.json_response({"query": request.query_string})


@asynccontextmanager
async def _counted() -> AsyncIterator[tuple[_Instance, Counter]]:
    instance = _Instance()
    app = web.Application(client_max_size=1 << 30)
    app.router.add_post(CHAT, instance.chat)
    app.router.add_get("/health", instance.health)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        async with counting(f"http://127.0.0.1:{runner.addresses[0][1]}") as counter:
            yield instance, counter
    finally:
        await runner.cleanup()


async def test_bodies_of_chat_completions_are_counted_and_arrive_unchanged() -> None:
    bodies = [b"x" * 10, b"y" * 5_000_000]
    async with _counted() as (instance, counter), aiohttp.ClientSession() as session:
        for body in bodies:
            async with session.post(counter.url + CHAT, data=body, headers={"authorization": "Bearer a"}) as reply:
                assert await reply.read() == body
                assert reply.status == 418
                assert reply.headers["server-timing"] == "prefill;dur=2"
    assert instance.bodies == bodies
    assert instance.headers[0]["authorization"] == "Bearer a"
    assert (counter.requests, counter.body_bytes) == (2, 5_000_010)


async def test_a_body_without_a_known_length_is_counted_too() -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"abc"
        yield b"de"

    async with (
        _counted() as (instance, counter),
        aiohttp.ClientSession() as session,
        session.post(counter.url + CHAT, data=pieces()) as reply,
    ):
        assert await reply.read() == b"abcde"
    assert instance.bodies == [b"abcde"]
    assert (counter.requests, counter.body_bytes) == (1, 5)


async def test_probes_pass_and_are_not_counted() -> None:
    async with _counted() as (_, counter), aiohttp.ClientSession() as session:
        async with session.get(f"{counter.url}/health?a=1") as reply:
            assert await reply.json() == {"query": "a=1"}
        async with session.get(f"{counter.url}/unknown") as reply:
            assert reply.status == 404
    assert (counter.requests, counter.body_bytes) == (0, 0)


async def test_a_stream_passes_while_it_comes() -> None:
    async with _counted() as (instance, counter), opened() as client:
        seen = 0
        async for answer in client.follow(counter.url, b'{"stream":true}'):
            if len(answer.token_times) == 1:
                seen += 1
                instance.go_on.set()
        assert seen
        assert len(answer.token_times) == 2


async def test_who_leaves_a_stream_ends_it_at_the_instance() -> None:
    async with _counted() as (instance, counter), opened() as client:
        answers = client.follow(counter.url, b'{"stream":true}')
        await anext(answers)
        await answers.aclose()
        await asyncio.wait_for(instance.left.wait(), 30)


async def test_an_instance_that_is_gone_is_a_bad_gateway() -> None:
    async with _counted() as (_, counter):
        target = counter.url
    async with (
        counting(target) as counter,
        aiohttp.ClientSession() as session,
        session.get(f"{counter.url}/health") as reply,
    ):
        assert reply.status == 502
        assert target in await reply.text()
