"""Servers that the bench starts itself with real processes, and the server that counts in front of an instance."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import psutil
import pytest
from aiohttp import web

from chiasm.bench.client import opened
from chiasm.bench.measurement import Bench
from chiasm.bench.servers import Command, Counter, counting, served, supervised
from chiasm.errors import ChiasmError, ConfigurationError
from chiasm.launch.ports import HeldPort
from chiasm.wire import CHAT_PATH

_SERVER = """
import http.server, os, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/die":
            os._exit(1)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(str(os.getpid()).encode())

http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def _command(address: HeldPort, code: str = _SERVER) -> Command:
    arguments = [sys.executable, "-c", code, str(address.port)]
    return Command("a server", supervised(address.url, arguments), os.environ)


async def _pid(session: aiohttp.ClientSession, url: str) -> int | None:
    try:
        async with session.get(f"{url}/health") as reply:
            return int(await reply.text())
    except aiohttp.ClientError:
        return None


async def test_a_server_runs_from_ready_to_the_end(tmp_path: Path) -> None:
    addresses = [HeldPort("127.0.0.1"), HeldPort("127.0.0.1")]
    commands = map(_command, addresses)
    async with (
        opened() as client,
        aiohttp.ClientSession() as session,
        served(Bench("m", tmp_path, client), *commands, ready_seconds=60),
    ):
        pids = [await _pid(session, address.url) for address in addresses]
        processes = [psutil.Process(pid) for pid in pids if pid is not None]
        assert len(set(pids)) == len(processes) == 2
    _, alive = psutil.wait_procs(processes, 60)
    assert not alive


async def test_a_server_that_cannot_start_fails_with_its_last_lines(tmp_path: Path) -> None:
    command = _command(HeldPort("127.0.0.1"), "raise ValueError('there is no such model')")
    async with opened() as client:
        with pytest.raises(ConfigurationError, match="there is no such model"):
            async with served(Bench("m", tmp_path, client), command, ready_seconds=60):
                pytest.fail("it was never ready")


async def test_a_server_that_dies_during_a_measurement_is_an_error(tmp_path: Path) -> None:
    async def measure(address: HeldPort) -> None:
        async with (
            opened() as client,
            aiohttp.ClientSession() as session,
            served(Bench("m", tmp_path, client), _command(address), ready_seconds=60),
        ):
            first = await _pid(session, address.url)
            with pytest.raises(aiohttp.ClientError):
                await session.get(f"{address.url}/die")
            while await _pid(session, address.url) in (None, first):  # noqa: ASYNC110 the supervisor restarts it
                await asyncio.sleep(0.05)

    with pytest.raises(ChiasmError, match="a server died during the measurement"):
        await measure(HeldPort("127.0.0.1"))


# ---- counting ---------------------------------------------------------------------------------------------------------

_EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'


class _Instance:
    """Answers chat completions with their own body, or with a stream that pauses until ``go_on`` is set."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.headers: list[Mapping[str, str]] = []
        self.go_on = asyncio.Event()
        self.left = asyncio.Event()
        """Set when a client has left a stream before its end."""

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
    app.router.add_post(CHAT_PATH, instance.chat)
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
            async with session.post(counter.url + CHAT_PATH, data=body, headers={"authorization": "Bearer a"}) as reply:
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
        session.post(counter.url + CHAT_PATH, data=pieces()) as reply,
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


async def test_a_stream_is_passed_on_while_it_arrives() -> None:
    async with _counted() as (instance, counter), opened() as client:
        seen = 0
        async for answer in client.follow(counter.url, b'{"stream":true}'):
            if len(answer.token_times) == 1:
                seen += 1
                instance.go_on.set()
        assert seen
        assert len(answer.token_times) == 2


async def test_a_client_that_leaves_a_stream_ends_it_at_the_instance() -> None:
    async with _counted() as (instance, counter), opened() as client:
        answers = client.follow(counter.url, b'{"stream":true}')
        await anext(answers)
        await answers.aclose()
        await asyncio.wait_for(instance.left.wait(), 30)


async def test_an_instance_that_is_gone_is_a_bad_gateway() -> None:
    nobody = HeldPort("127.0.0.1")
    async with (
        counting(nobody.url) as counter,
        aiohttp.ClientSession() as session,
        session.get(f"{counter.url}/health") as reply,
    ):
        assert reply.status == 502
        assert nobody.url in await reply.text()
    nobody.release()
