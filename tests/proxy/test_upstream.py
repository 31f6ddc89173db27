"""Calls of instances: how they end."""

from __future__ import annotations

import asyncio
import time
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator

import pytest

from chiasm.proxy.upstream import InstanceLostError, Line, NoResponseInTimeError, Upstream


class Silent:
    """An instance that takes requests and never answers."""

    def __init__(self) -> None:
        self.url = ""
        self.asked = asyncio.Semaphore(0)

    async def serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        self.asked.release()
        await reader.read()
        writer.close()


@pytest.fixture
async def silent() -> AsyncIterator[Silent]:
    instance = Silent()
    listener = await asyncio.start_server(instance.serve, "127.0.0.1", 0)
    instance.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    yield instance
    listener.close()


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    made = Upstream(5.0)
    yield made
    made.close()


async def test_a_question_counts_as_work_also_when_it_is_the_only_one(silent: Silent, upstream: Upstream) -> None:
    line = Line()
    question = asyncio.create_task(upstream.get(silent.url, max_bytes=1, line=line))
    await silent.asked.acquire()
    assert line.break_off() == 1
    with pytest.raises(NoResponseInTimeError):
        await question


async def test_giving_an_instance_up_ends_all_its_calls_also_while_one_runs_out_of_time(
    silent: Silent, upstream: Upstream
) -> None:
    line, loop = Line(), asyncio.get_running_loop()
    question = asyncio.create_task(upstream.get(silent.url, max_bytes=1, timeout_seconds=0.5, line=line))
    work = asyncio.create_task(upstream.post(silent.url, "/", b"{}", {}, line=line))
    for _ in range(2):
        await silent.asked.acquire()
    ended = loop.create_future()
    loop.call_later(0.6, lambda: ended.set_result(line.break_off()))
    time.sleep(0.7)  # noqa: ASYNC251 - so both are due when the loop goes on
    async with asyncio.timeout(10):
        outcomes = await asyncio.gather(question, work, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [NoResponseInTimeError, InstanceLostError]
    assert await ended == 2
