from __future__ import annotations

import asyncio

import pytest

from chiasm.proxy import memory
from chiasm.proxy.memory import Memory
from tests.proxy.conftest import Start, ask
from tests.proxy.instances import FakeInstance

MIB = 1 << 20


@pytest.fixture
def trims(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each call of the C library; requests' memory is given back as soon as they end."""
    calls: list[int] = []
    monkeypatch.setattr(memory, "_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(memory, "give_back", lambda: calls.append(1))
    return calls


async def test_requests_that_hold_little_cost_no_call(trims: list[int]) -> None:
    one = Memory()
    for total in range(0, 32 * MIB, MIB):
        one.note_released(total)
        await asyncio.sleep(0)
    assert not trims
    await one.close()


async def test_many_that_end_at_once_cost_one_call(trims: list[int]) -> None:
    one = Memory()
    for count in range(1, 5):
        one.note_released(count * 100 * MIB)
    async with asyncio.timeout(60):
        while not trims:  # noqa: ASYNC110 - a call of the C library is no event
            await asyncio.sleep(0.01)
    await one.close()
    assert len(trims) == 1


async def test_large_bodies_that_end_have_memory_given_back(start: Start, trims: list[int]) -> None:
    front = await start([FakeInstance("pd")])
    body = b" " * (40 * MIB) + b"{}"
    assert (await front.post(body, **{"Content-Type": "application/json"})).status == 413
    async with asyncio.timeout(60):
        while not trims:
            assert (await front.post(ask("hello"))).status == 200
