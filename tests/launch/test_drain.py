"""``chiasm drain``, asked of an instance: it begins a drain, and notices its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest
from aiohttp import web

from chiasm.fleet_key import FleetKey, make_fleet_key
from chiasm.http.fleet_calls import body_digest
from chiasm.launch.drain import Drain, NotDrainedError
from chiasm.wire import (
    DRAIN_PATH,
    FLEET_HEADER,
    LEASE_PATH,
    DrainState,
    ErrorBody,
    ErrorDetail,
    Health,
    LeaseAnswer,
)

CLOCK = 1_000_000_000_000
"""Milliseconds of Unix time: years behind."""
STATE = DrainState(incarnation="first", requests=2, kv=1)


class Place:
    """Stands in for an instance or a proxy. ``drained`` and ``health`` are what it answers."""

    def __init__(self) -> None:
        self.url = ""
        self.orders: list[tuple[bytes, str]] = []
        """Body and signature of each order to drain."""
        self.drained: tuple[int, msgspec.Struct] = (202, STATE)
        self.health: tuple[int, msgspec.Struct] = (503, Health(incarnation="first", clock_milliseconds=CLOCK))
        self.is_proxy = False
        """Whether it takes leases."""
        self.looks = 0
        self.looked = asyncio.Condition()
        self._runner: web.AppRunner

    async def start(self) -> None:
        application = web.Application()
        application.router.add_post(DRAIN_PATH, self._drain)
        application.router.add_get("/health", self._health)
        application.router.add_get(LEASE_PATH, self._lease)
        self._runner = web.AppRunner(application, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def end(self) -> None:
        await self._runner.cleanup()

    async def until_looked(self, times: int) -> None:
        """Return when its health has been asked for so many times more."""
        wanted = self.looks + times
        async with asyncio.timeout(60), self.looked:
            await self.looked.wait_for(lambda: self.looks >= wanted)

    async def _drain(self, request: web.Request) -> web.Response:
        self.orders.append((await request.read(), request.headers.get(FLEET_HEADER, "")))
        return _respond(*self.drained)

    async def _health(self, request: web.Request) -> web.Response:
        self.looks += 1
        async with self.looked:
            self.looked.notify_all()
        return _respond(*self.health)

    async def _lease(self, request: web.Request) -> web.Response:
        if not self.is_proxy:
            return _respond(404, ErrorBody(error=ErrorDetail(message="Nothing is served under this path.")))
        return _respond(200, LeaseAnswer(clock_milliseconds=CLOCK))


def _respond(status: int, content: msgspec.Struct) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(content))


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    place = Place()
    await place.start()
    yield place
    await place.end()


async def test_it_returns_what_the_instance_has_left(place: Place) -> None:
    async with Drain(place.url) as drain:
        assert await drain.begin() == STATE
    assert place.orders == [(b"{}", "")]


@pytest.mark.parametrize("through_proxy", [False, True])
async def test_an_order_is_signed_by_the_clock_of_the_one_that_gets_it(place: Place, through_proxy: bool) -> None:
    key = FleetKey([make_fleet_key()])
    place.is_proxy = through_proxy
    url, proxy = ("http://10.0.0.5:8001", place.url) if through_proxy else (place.url, None)
    async with Drain(url, key=key, proxy=proxy) as drain:
        await drain.begin()
    ((body, signature),) = place.orders
    assert msgspec.json.decode(body) == ({"url": url} if through_proxy else {})
    assert signature.split()[1] == str(CLOCK)
    assert body_digest(body).hex() in signature


async def test_a_refusal_says_why(place: Place) -> None:
    place.drained = (403, ErrorBody(error=ErrorDetail(message="Not here.")))
    async with Drain(place.url) as drain:
        with pytest.raises(NotDrainedError, match="refuses with status 403: Not here"):
            await drain.begin()
    await place.end()
    async with Drain(place.url) as drain:
        with pytest.raises(NotDrainedError, match="can't be reached"):
            await drain.begin()


async def test_a_refusal_without_a_key_says_which_options_give_one(place: Place) -> None:
    place.drained = (403, ErrorBody(error=ErrorDetail(message="Send requests to the proxy.", code="fleet_key_needed")))
    async with Drain(place.url) as drain:
        with pytest.raises(NotDrainedError, match="Give it with --fleet-key-file or CHIASM_FLEET_KEY"):
            await drain.begin()
    place.drained = (401, ErrorBody(error=ErrorDetail(message="Send the key.", type="authentication_error")))
    place.is_proxy = True
    async with Drain("http://10.0.0.5:8001", proxy=place.url) as drain:
        with pytest.raises(NotDrainedError, match="Give one with CHIASM_ADMIN_KEY, --admin-key, --fleet-key-file"):
            await drain.begin()


async def test_an_instance_that_is_named_as_the_proxy_does_not_drain(place: Place) -> None:
    async with Drain("http://10.0.0.5:8001", proxy=place.url) as drain:
        with pytest.raises(NotDrainedError, match=f"{place.url} is not a proxy"):
            await drain.begin()
    assert not place.orders


async def test_it_has_ended_when_nothing_listens_there(place: Place) -> None:
    async with Drain(place.url) as drain:
        ended = asyncio.create_task(drain.ended(await drain.begin(), 60))
        await place.until_looked(2)
        assert not ended.done()
        await place.end()
        assert await ended


async def test_it_has_ended_when_another_process_answers_there(place: Place) -> None:
    async with Drain(place.url) as drain:
        ended = asyncio.create_task(drain.ended(await drain.begin(), 60))
        await place.until_looked(1)
        place.health = (200, Health(incarnation="second"))
        assert await ended


async def test_an_instance_that_refuses_to_answer_has_not_ended(place: Place) -> None:
    place.health = (503, ErrorBody(error=ErrorDetail(message="There are too many connections.")))
    async with Drain(place.url) as drain:
        ended = asyncio.create_task(drain.ended(await drain.begin(), 60))
        await place.until_looked(3)
        assert not ended.done()
        ended.cancel()
        assert not await drain.ended(STATE, 0.0)


async def test_an_answer_that_arrives_in_pieces_is_read_whole() -> None:
    """As from another machine: a page that says what work costs is larger than a packet."""
    looked = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        body = msgspec.json.encode(STATE if request.startswith(b"POST") else Health(incarnation="first"))
        writer.write(b"HTTP/1.1 202 Accepted\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body))
        for place in range(len(body)):
            writer.write(body[place : place + 1])
            await writer.drain()
            await asyncio.sleep(0)
        writer.close()
        if request.startswith(b"GET"):
            looked.set()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with Drain(url) as drain:
            assert await drain.begin() == STATE
            ended = asyncio.create_task(drain.ended(STATE, 60))
            for _ in range(2):
                await looked.wait()
                looked.clear()
            assert not ended.done()
            ended.cancel()
