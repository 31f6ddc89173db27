"""What one client may cost a server before and beside its requests; a good client beside it is answered."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import httpx2 as httpx
import pytest

from chiasm.http.limits import Limit
from chiasm.prometheus import read_samples, total
from chiasm.server.config import ServerConfig
from chiasm.server.context import ServerContext
from tests.attacks.proxy_process import Peer, Proxy, post, running
from tests.http.test_tls import GOOD, KEY

MIB = 1 << 20


@pytest.fixture
async def proxy() -> AsyncIterator[Proxy]:
    async with running() as one:
        yield one


CHUNKED = post(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
ENDLESS = {
    "fields": (b"GET / HTTP/1.1\r\n", b"a: b\r\n" * 10_000),
    "a field": (b"GET / HTTP/1.1\r\nlong: ", b"x" * 60_000),
    "a request line": (b"GET /", b"x" * 60_000),
    "empty lines": (b"", b"\r\n" * 30_000),
    "fields after a body": (
        CHUNKED + b"0\r\n",
        b"a: b\r\n" * 10_000,
    ),
    "a chunk's extension": (
        CHUNKED + b"5;",
        b"x" * 60_000,
    ),
}


async def test_heads_without_an_end_are_refused_before_they_are_stored(proxy: Proxy) -> None:
    assert await proxy.good_client() == 200
    before = proxy.memory_bytes
    for first, more in ENDLESS.values():
        peer = await proxy.connect()
        await peer.send(first)
        sent = 0
        while sent < 100 * MIB and await peer.send(more):
            sent += len(more)
        assert sent < 100 * MIB
        assert await proxy.good_client() == 200
    assert proxy.memory_bytes < before + 16 * MIB


@pytest.mark.parametrize(
    ("head", "limit"),
    [
        (b"GET / HTTP/1.1\r\nlong: " + b"x" * (64 << 10), Limit.HEADER_BYTES),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 129 + b"\r\n", Limit.HEADER_FIELDS),
    ],
)
async def test_a_head_that_is_too_large_is_refused_with_431(proxy: Proxy, head: bytes, limit: Limit) -> None:
    peer = await proxy.connect()
    await peer.send(head)
    reply = await peer.reply()
    assert reply.status == 431
    assert b"limit" in reply.body
    assert await peer.closed() == b""
    assert await proxy.refusals(limit) == 1


async def test_a_head_that_does_not_arrive_is_refused_with_408() -> None:
    async with running("--header-timeout-seconds", "0.5") as proxy:
        silent = await proxy.connect()
        status = 0
        while not status:  # who sends nothing in time, which a busy machine may bring about, is not answered
            slow = await proxy.connect()
            await slow.send(b"GET / HTTP/1.1\r\n")
            with contextlib.suppress(ConnectionError):
                status = (await slow.reply()).status
        assert status == 408
        assert await silent.closed() == b""
        assert await proxy.refusals(Limit.HEADER_TIMEOUT) == 1


@pytest.mark.parametrize("first", [b"", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", b"GET / HT"])
async def test_connections_that_ask_nothing_make_way(first: bytes) -> None:
    """Also if there are fewer descriptors than the connections that are allowed."""
    async with running(descriptors=256) as proxy:
        peers = [await proxy.connect() for _ in range(300)]
        for peer in peers:
            await peer.send(first)
        assert [await proxy.good_client() for _ in range(10)] == [200] * 10


@pytest.mark.parametrize("first", [b"", b"\x16\x03\x01"], ids=["silent", "half a handshake"])
async def test_handshakes_that_do_not_come_make_way(first: bytes) -> None:
    """Also if there are fewer descriptors than the connections that are allowed."""
    tls = ("--ssl-certfile", str(GOOD), "--ssl-keyfile", str(KEY), "--header-timeout-seconds", "1000")
    async with running(*tls, descriptors=256) as proxy:
        peers = [await proxy.connect() for _ in range(300)]
        for peer in peers:
            await peer.send(first)
        alone = {"Connection": "close"}  # one that is idle would make way too
        async with httpx.AsyncClient(verify=False, timeout=60, headers=alone) as session:
            for _ in range(3):
                assert (await session.get(f"{proxy.url}/livez")).status_code == 200
            await asyncio.gather(*(peer.closed() for peer in peers[:200]))
            answers = await asyncio.gather(*(session.get(f"{proxy.url}/livez") for _ in range(20)))
        assert {one.status_code for one in answers} == {200}


async def test_bodies_that_do_not_come_take_no_places() -> None:
    async with running("--max-concurrent-requests", "4") as proxy:
        for _ in range(20):
            peer = await proxy.connect()
            await peer.send(post(1000) + b"{")
        assert [await proxy.good_client() for _ in range(10)] == [200] * 10


async def test_idle_connections_and_bodies_that_drip_do_not_hold_up_a_good_client() -> None:
    """200 connections that ask nothing, and 50 whose bodies come byte by byte, until those are refused for being slow."""

    async def drip(peer: Peer) -> int:
        await peer.send(post(1000) + b"{")
        reply = asyncio.ensure_future(peer.reply())
        while not reply.done() and await peer.send(b" "):
            await asyncio.wait((reply,), timeout=0.1)
        return (await reply).status

    limits = ("--body-timeout-seconds", "5", "--header-timeout-seconds", "300", "--max-concurrent-requests", "4")
    async with running(*limits) as proxy:
        idle = [await proxy.connect() for _ in range(200)]
        dripping = [asyncio.ensure_future(drip(await proxy.connect())) for _ in range(50)]
        beside = 0
        while not all(one.done() for one in dripping):
            assert await proxy.good_client() == 200
            beside += 1
        assert beside
        assert [await one for one in dripping] == [408] * 50
        assert not any(peer.reader.at_eof() for peer in idle)
        assert await proxy.refusals(Limit.BODY_TIMEOUT) == 50


async def test_who_is_busy_is_not_closed_and_one_peer_gets_no_more_than_its_part() -> None:
    async with running("--max-connections-per-peer", "20") as proxy:
        busy = [await proxy.connect() for _ in range(20)]
        for peer in busy:
            await peer.send(post(1000, "Expect: 100-continue"))
            assert b" 100 " in await peer.reader.readuntil(b"\r\n\r\n")  # its body is awaited
        refused = await (await proxy.connect()).reply()
        assert refused.status == 503
        assert b"connections" in refused.body
        assert not any(peer.reader.at_eof() for peer in busy)


async def test_unfinished_bodies_leave_room_for_small_ones() -> None:
    async with running("--max-buffered-bytes", "64MiB") as proxy:
        peers = [await proxy.connect() for _ in range(9)]
        await asyncio.gather(*(peer.send(post(20 * MIB) + b" " * (15 * MIB)) for peer in peers))
        assert [await proxy.good_client() for _ in range(10)] == [200] * 10


async def test_a_client_that_sends_all_of_its_body_sees_why_it_is_refused() -> None:
    async with running("--max-body-bytes", "1MiB", "--api-key", "k" * 20) as proxy:
        key = f"Authorization: Bearer {'k' * 20}"
        for fields, status in (
            ([key], 413),
            ([], 401),
            ([key, "Content-Type: text/plain"], 415),
            ([key, "X-Request-Deadline-Ms: 0"], 504),
        ):
            for connection in ("close", "keep-alive"):
                for _ in range(5):
                    peer = await proxy.connect()
                    head = post(4 * MIB, f"Connection: {connection}", *fields)
                    if len(fields) > 1:
                        head = head.replace(b"Content-Type: application/json\r\n", b"")
                    assert await peer.send(head + b" " * (4 * MIB))
                    assert (await peer.reply()).status == status


async def test_what_comes_after_an_answer_is_not_read_forever() -> None:
    async with running("--discard-seconds", "0.5") as proxy:
        peer = await proxy.connect()
        await peer.send(b"POST /unknown HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
        assert (await peer.reply()).status == 404
        assert await peer.closed() == b""
        assert await proxy.refusals(Limit.UNREAD_BODY) == 1


def test_an_instance_counts_its_refusals_too() -> None:
    context = ServerContext("model", ServerConfig())
    context.metrics.refusals.note(Limit.CONNECTIONS)
    samples = read_samples(context.metrics.expose().decode())
    counts = {limit: total(samples, "chiasm_http_refusals_total", limit=limit) for limit in Limit}
    assert counts == {limit: float(limit is Limit.CONNECTIONS) for limit in Limit}


async def test_a_connection_whose_unread_body_came_whole_can_be_used_again(proxy: Proxy) -> None:
    peer = await proxy.connect()
    for _ in range(3):
        await peer.send(b"POST /unknown HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
        assert (await peer.reply()).status == 404
        await peer.send(b"x" * 1000)


HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


async def test_what_is_no_http_ends_the_connection_behind_the_answer_before_it(proxy: Proxy) -> None:
    """Many times, since it is left to chance whether it comes before or after that answer."""

    async def spoil(rest: bytes, *, in_pieces: bool) -> None:
        peer = await proxy.connect()
        for piece in (HEALTH, rest) if in_pieces else (HEALTH + rest,):
            await peer.send(piece)
        assert (await peer.reply()).status == 200
        await peer.closed()

    for rest in (b"not HTTP\r\n\r\n", b"\0" * 3 * MIB, b"\r\n\xff", HEALTH + b"\0"):
        for _ in range(10):
            await asyncio.gather(*(spoil(rest, in_pieces=index % 2 == 0) for index in range(4)))
    assert await proxy.good_client() == 200
