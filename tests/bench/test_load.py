"""When requests are sent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
from aiohttp import web

from chiasm.bench.client import RequestFailedError, opened
from chiasm.bench.load import alternate, at_most, gaps_meanwhile, open_loop, poisson, stream_in_turns, turns
from chiasm.bench.measurement import Bench
from chiasm.bench.requests import chat
from chiasm.wire import CHAT_PATH

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
    app.router.add_post(CHAT_PATH, server.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        async with opened() as client:
            yield Bench("m", folder, client)
    finally:
        await runner.cleanup()


def test_arrivals_are_seeded_and_come_at_the_rate() -> None:
    times = poisson(5, rate_per_second=20, seconds=100)
    assert times == poisson(5, rate_per_second=20, seconds=100)
    assert times == sorted(times)
    assert len(times) == pytest.approx(2000, rel=0.1)
    assert times[0] > 0
    assert times[-1] < 100
    with pytest.raises(ValueError, match="above 0"):
        poisson(5, rate_per_second=0, seconds=1)


async def test_an_open_loop_does_not_wait_for_answers() -> None:
    sent: list[int] = []
    all_sent = asyncio.Event()

    async def send(index: int) -> int:
        sent.append(index)
        if len(sent) == 3:
            all_sent.set()
        await all_sent.wait()
        return index * index

    assert await open_loop([0.0, 0.001, 0.002], send) == [0, 1, 4]


async def test_a_closed_loop_keeps_a_number_of_calls_running_and_the_order_of_results() -> None:
    under_way = most = 0

    async def send(index: int) -> int:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0)
        under_way -= 1
        return -index

    assert await at_most(3, 10, send) == [-index for index in range(10)]
    assert most == 3


@pytest.mark.parametrize("sending", [partial(open_loop, [0.0, 0.0, 0.0]), partial(at_most, 3, 3)])
async def test_the_first_failure_ends_the_other_calls_and_is_raised(
    sending: Callable[[Callable[[int], Awaitable[None]]], Awaitable[list[None]]],
) -> None:
    ended: list[int] = []

    async def send(index: int) -> None:
        if index == 1:
            raise RequestFailedError("it answered 503")
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(index)

    with pytest.raises(RequestFailedError, match="503"):
        await sending(send)
    assert sorted(ended) in ([0], [0, 2])


def test_each_server_is_first_in_turn() -> None:
    assert [turns(index, 3) for index in (-1, 0, 1, 2)] == [[2, 0, 1], [0, 1, 2], [1, 2, 0], [2, 0, 1]]


def test_alternating_actions_reverse_their_order_and_the_first_round_does_not_count() -> None:
    called: list[str] = []

    def first() -> tuple[float]:
        called.append("first")
        return (float(called.count("first")),)

    def second() -> tuple[float, float]:
        called.append("second")
        return -float(called.count("second")), 0.0

    assert alternate([first, second], 3) == [3.0, -3.0, 0.0]
    assert called == ["first", "second", "second", "first"] * 2


async def test_streams_in_turns_are_counted_after_the_warm_up(tmp_path: Path) -> None:
    server = _Server(tokens=1)
    async with _running(server, tmp_path) as bench:
        answers = await stream_in_turns(
            bench, [server.url, server.url], lambda index: chat(str(index), max_tokens=1), rounds=2, warm_up=1
        )
    assert server.came == ["-1", "-1", "0", "0", "1", "1"]
    assert [[one.text for one in given] for given in answers] == [["a", "a"], ["a", "a"]]


# ---- streams while something else runs ---------------------------------------------------------------------------------


async def test_gaps_of_all_streams_are_collected_while_something_else_runs(tmp_path: Path) -> None:
    server = _Server(tokens=5, enough=8)
    async with _running(server, tmp_path) as bench:
        gaps = await gaps_meanwhile(bench, server.url, ["one", "two"], server.had_enough.wait, max_tokens=5)
    assert set(server.came) == {"one", "two"}
    assert len(gaps) >= 4 * 4  # eight streams, two of which began before, and two of which are still running
    assert all(gap >= 0 for gap in gaps)


async def test_something_else_begins_when_all_streams_have_a_token(tmp_path: Path) -> None:
    server = _Server(tokens=200)
    came_before: list[set[str]] = []

    async def note() -> None:
        came_before.append(set(server.came))

    async with _running(server, tmp_path) as bench:
        await gaps_meanwhile(bench, server.url, ["one", "two", "three"], note, max_tokens=200)
    assert came_before == [{"one", "two", "three"}]


async def test_a_stream_that_fails_at_once_is_an_error(tmp_path: Path) -> None:
    server = _Server(tokens=2, failing_after=0)
    async with _running(server, tmp_path) as bench:
        with pytest.raises(RequestFailedError, match="503"):
            await gaps_meanwhile(bench, server.url, ["one"], lambda: asyncio.sleep(60), max_tokens=2)


async def test_a_stream_that_fails_later_is_an_error_at_the_end(tmp_path: Path) -> None:
    server = _Server(tokens=2, failing_after=2)
    async with _running(server, tmp_path) as bench:

        async def until_it_failed() -> None:
            running = asyncio.all_tasks()  # the stream is one of them
            async with asyncio.timeout(60):
                while not any(one.done() and one.exception() for one in running):  # noqa: ASYNC110, it ends unseen
                    await asyncio.sleep(0.001)

        with pytest.raises(RequestFailedError, match="503"):
            await gaps_meanwhile(bench, server.url, ["one"], until_it_failed, max_tokens=2)
