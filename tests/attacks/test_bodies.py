"""Bodies that would become far more than they are, and answers that nobody reads."""

from __future__ import annotations

import asyncio
import json

import psutil
import pytest

from chiasm.http import Exchange
from chiasm.http.endpoint import Bounds, Handler
from chiasm.http.limits import Limit
from tests.attacks.proxy_process import Peer, post, running
from tests.http.serving import site

MIB = 1 << 20
TEXT = '{"messages":[{"role":"user","content":%s}]}'
BODIES = {
    "objects": (b'{"messages":[' + b"{}," * (20 * MIB) + b"{}]}", 413, Limit.TEXT_BYTES),
    "a text": ((TEXT % json.dumps("x" * (60 * MIB))).encode(), 413, Limit.TEXT_BYTES),
    "a text that looks like an image": (
        (TEXT % json.dumps("data:" + "A" * (60 * MIB))).encode(),
        413,
        Limit.TEXT_BYTES,
    ),
    "lists": (b'{"messages":[{"role":"user","content":"x"}],"a":[' + b"[]," * MIB + b"[]]}", 400, Limit.JSON_MEMBERS),
    "token ids": (b'{"messages":[{"role":"user","content":"x"}],"a":[' + b"1," * MIB + b"1]}", 400, Limit.JSON_VALUES),
    "messages": ((b'{"messages":[' + b"{}," * 2000 + b"{}]}"), 400, None),
}


async def test_bodies_that_would_become_too_much_are_refused_beside_good_ones() -> None:
    async with running() as proxy:
        assert await proxy.good_client() == 200
        before = proxy.memory_bytes
        for name, (body, status, limit) in BODIES.items():
            count = await proxy.refusals(limit) if limit else 0
            peers = [await proxy.connect() for _ in range(2)]

            async def ask(peer: Peer, body: bytes = body) -> int:
                await peer.send(post(len(body)) + body)
                return (await peer.reply()).status

            asked = [asyncio.ensure_future(ask(peer)) for peer in peers]
            assert [await proxy.good_client() for _ in range(5)] == [200] * 5
            assert await asyncio.gather(*asked) == [status] * 2, name
            if limit:
                assert await proxy.refusals(limit) == count + 2, name
            for peer in peers:
                peer.writer.close()
        async with asyncio.timeout(60):  # the C library gives it back after a while
            while proxy.memory_bytes >= before + 100 * MIB:
                assert await proxy.good_client() == 200


async def large(exchange: Exchange) -> None:
    await exchange.reply(b"x" * (64 * MIB))


async def endless(exchange: Exchange) -> None:
    await exchange.start_events()
    while True:
        await exchange.write(b"data: x\n\n" * 10_000)


def is_open(port: int, client: int) -> bool:
    """Whether this process has the server's end of a connection."""
    ends = [one for one in psutil.Process().net_connections("tcp4") if one.laddr and one.raddr]
    return any((one.laddr.port, one.raddr.port) == (port, client) for one in ends)


@pytest.mark.parametrize("handler", [large, endless])
async def test_an_answer_that_nobody_reads_ends_at_its_deadline(handler: Handler) -> None:
    """Its place is free, and its connection is closed, although what was written last has not gone out."""
    with site(handler, Bounds(deadline_seconds=0.5, max_body_bytes=10)) as server:
        port = int(server.url.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        client = writer.get_extra_info("sockname")[1]
        writer.write(post(2, path="/") + b"{}")
        await reader.readuntil(b"\r\n\r\n")
        async with asyncio.timeout(20):
            while not server.ended or is_open(port, client):  # noqa: ASYNC110 - a closed socket is no event
                await asyncio.sleep(0.01)
        assert (server.admission.requests, server.admission.held_bytes) == (0, 0)
        writer.transport.abort()
