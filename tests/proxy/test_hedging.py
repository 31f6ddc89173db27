"""The images of a late call go to a second encoder too, and the first answer counts."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp import web

from chiasm.proxy.encode_plan import Entry
from chiasm.proxy.encode_queue import EncodeQueue
from chiasm.proxy.fleet import Fleet
from chiasm.proxy.hedging import Hedging
from chiasm.proxy.instance import Instance
from chiasm.proxy.placement import Placement
from chiasm.proxy.prompts import ItemWork
from chiasm.wire import ECPlace, Role

from .conftest import Front, Start, ask, image, image_bytes, until_idle
from .instances import FakeInstance, Received, break_off, chat, encode, never
from .placed_fleet import ENCODE, PIXELS, add, costs

CALLS = 20
"""So many must be known before one is late, and so many pay for a hedge."""


# ---- when, and how often --------------------------------------------------------------------------------------------------


def learned(seconds: float = 1.0, calls: int = CALLS) -> Hedging:
    hedging = Hedging()
    for _ in range(calls):
        hedging.begin()
        hedging.learn(seconds, 0.99)
    return hedging


def test_no_call_is_late_before_enough_are_known() -> None:
    assert learned(calls=CALLS - 1).late_after(1.0) is None
    assert learned(calls=CALLS).late_after(1.0) is not None


def test_a_call_is_late_after_what_nineteen_of_twenty_have_taken() -> None:
    hedging = Hedging()
    for number in range(100):
        hedging.learn(1.0 + number / 100, 0.99)
    assert hedging.late_after(0.99) == pytest.approx(1.94)
    assert hedging.late_after(9.99) == pytest.approx(19.4)


def test_only_the_last_calls_count() -> None:
    hedging = learned(50.0, 200)
    for _ in range(200):
        hedging.learn(2.0, 0.99)
    assert hedging.late_after(0.99) == pytest.approx(2.0)


def test_a_short_call_is_not_late_at_once() -> None:
    assert learned(0.001).late_after(0.01) == 0.05


@pytest.mark.parametrize(("calls", "hedges"), [(19, 0), (20, 1), (59, 2), (1000, 4)])
def test_one_call_in_twenty_is_hedged_and_few_at_once(calls: int, hedges: int) -> None:
    hedging, count = learned(calls=calls), 0
    while hedging.is_allowed(0.0):
        hedging.spend()
        count += 1
    assert count == hedges


def test_over_many_calls_one_in_twenty_is_hedged() -> None:
    hedging, count = Hedging(), 0
    for _ in range(1000):
        hedging.begin()
        if hedging.is_allowed(0.0):
            hedging.spend()
            count += 1
    assert count == 50


@pytest.mark.parametrize(("share", "hedges"), [(0.0, 0), (0.1, 100), (0.5, 500)])
def test_the_share_that_is_hedged_can_be_set(share: float, hedges: int) -> None:
    hedging, count = Hedging(share), 0
    for _ in range(1000):
        hedging.begin()
        if hedging.is_allowed(0.0):
            hedging.spend()
            count += 1
    assert count == hedges


def test_nothing_is_hedged_while_the_encoders_are_busy() -> None:
    hedging = learned()
    hedging.note_busy(1.0, 0.0)
    assert hedging.busy(0.0) == 0
    assert hedging.is_allowed(1.0)
    assert not hedging.is_allowed(10.0)
    hedging.note_busy(0.5, 10.0)
    assert not hedging.is_allowed(10.0)
    assert hedging.is_allowed(20.0)
    assert hedging.busy(100.0) == pytest.approx(0.5)


# ---- where ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fleet() -> Fleet:
    return Fleet()


@pytest.fixture
def queue(fleet: Fleet) -> EncodeQueue:
    queue = Placement(fleet).images
    queue.hedging = learned()
    return queue


def encoder(fleet: Fleet, name: str, speed: float = 1.0, **health: Any) -> Instance:
    return add(fleet, name, Role.ENCODER, known=costs(speed=speed), **health)


def sent(queue: EncodeQueue, *names: str) -> list[Entry]:
    """Give images of one request to encoders; return them."""
    entries = [Entry(ItemWork(name, PIXELS), 0.0, request="r") for name in names]
    for entry in entries:
        queue.add(entry)
    assert sum(len(feed.entries) for feed in queue.feed(0.0)) == len(names)
    return entries


def test_a_call_says_what_its_encoder_has_to_do_for_it(fleet: Fleet, queue: EncodeQueue) -> None:
    encoder(fleet, "1")
    queue.add(Entry(ItemWork("a", PIXELS), 0.0, request="a"))
    assert [feed.seconds for feed in queue.feed(0.0)] == pytest.approx([ENCODE])
    queue.add(Entry(ItemWork("b", PIXELS), 0.0, request="b"))
    assert [feed.seconds for feed in queue.feed(0.1)] == pytest.approx([2 * ENCODE - 0.1])


def test_a_look_up_is_not_expected_to_take_any_computing(fleet: Fleet, queue: EncodeQueue) -> None:
    encoder(fleet, "1")
    queue.finish(sent(queue, "a"), 0.0)
    queue.add(Entry(ItemWork("a", PIXELS), 0.0))
    assert [feed.seconds for feed in queue.feed(0.0)] == [0.0]


def test_a_late_call_goes_to_the_fastest_encoder_that_is_idle(fleet: Fleet, queue: EncodeQueue) -> None:
    first, slow, fast = (encoder(fleet, name, speed) for name, speed in (("1", 9.0), ("2", 2.0), ("3", 4.0)))
    entries = sent(queue, "a", "b")
    feed = queue.hedge(entries, 1.0)
    assert feed is not None
    assert feed.encoder is fast
    assert [entry.item for entry in feed.entries] == [entry.item for entry in entries]
    assert {entry.encoder for entry in entries} == {first}
    left = queue.plan(0.0, 1.0).left
    assert left[fast] == pytest.approx(2 * ENCODE / 4)
    queue.release(feed.entries, 1.0)
    assert queue.plan(0.0, 1.0).left[fast] == 0
    assert slow


def test_an_image_is_hedged_once(fleet: Fleet, queue: EncodeQueue) -> None:
    for name in "123":
        encoder(fleet, name)
    queue.hedging = learned(calls=100)
    entries = sent(queue, "a")
    assert queue.hedge(entries, 1.0)
    assert queue.hedge(entries, 1.0) is None


def test_a_hedge_needs_another_encoder_that_is_idle_and_has_not_failed(fleet: Fleet, queue: EncodeQueue) -> None:
    encoder(fleet, "1", 9.0)
    (entry,) = sent(queue, "a")
    assert queue.hedge([entry], 1.0) is None
    second = encoder(fleet, "2")
    entry.failed_at.add(second)
    assert queue.hedge([entry], 1.0) is None
    entry.failed_at.clear()
    queue.pause(second, 1.0)
    assert queue.hedge([entry], 1.0) is None
    other = Entry(ItemWork("b", PIXELS), 0.0)
    queue.add(other)
    queue.feed(5.0)
    assert other.encoder is second
    assert queue.hedge([entry], 5.0) is None
    queue.finish([other], 5.0)
    assert queue.hedge([entry], 5.0)


def test_a_hedge_is_one_call(fleet: Fleet, queue: EncodeQueue) -> None:
    encoder(fleet, "1", 9.0)
    entries = sent(queue, "a", "b")
    encoder(fleet, "2", max_items=1)
    assert queue.hedge(entries, 1.0) is None
    encoder(fleet, "3", max_items=2)
    assert queue.hedge(entries, 1.0)


def test_no_hedge_is_given_beyond_the_budget(fleet: Fleet, queue: EncodeQueue) -> None:
    for name in "123":
        encoder(fleet, name)
    assert queue.hedge(sent(queue, "a"), 1.0)
    assert queue.hedge(sent(queue, "b"), 1.0) is None


# ---- behind the proxy -----------------------------------------------------------------------------------------------------

WON = 'chiasm_proxy_hedges_total{outcome="won"}'
LOST = 'chiasm_proxy_hedges_total{outcome="lost"}'
PEER: dict[str, Any] = {"ec_connector": "SharedMemoryConnector", "ec_store": ""}
LATE = ask(image(image_bytes("white")))


class Race:
    """Two encoders that have answered enough calls, a PD, and the proxy."""

    def __init__(self, front: Front, encoders: list[FakeInstance], pd: FakeInstance) -> None:
        self.front = front
        self.encoders = encoders
        self.pd = pd

    async def begin(self) -> tuple[asyncio.Task[Any], FakeInstance, FakeInstance]:
        """Send a request; return it, the encoder that got its image first, and the one that got it as a hedge."""
        request = asyncio.create_task(self.front.post(LATE))
        for one in self.encoders:  # the second gets it as a hedge
            await asyncio.wait_for(one.arrived.acquire(), 60)
        first, second = sorted(self.encoders, key=lambda one: one.received[0].at)
        return request, first, second

    async def outcomes(self) -> tuple[float, float]:
        return await self.front.metric(WON), await self.front.metric(LOST)

    async def ended(self) -> None:
        """Check that nothing is left of any call."""
        await until_idle(self.front)
        desks = self.front.service.router._placement.images._desks
        assert not any(desk.entries for desk in desks.values())


@pytest.fixture
async def race(start: Start) -> Race:
    encoders = [
        FakeInstance("encoder", ec_place=ECPlace(host="10.0.0.1", port=port, engine_id=str(port)), **PEER)
        for port in (4001, 4002)
    ]
    pd = FakeInstance("pd", **PEER)

    async def when_encoded(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        while await front.metric('chiasm_proxy_items_total{outcome="encoded"}') < len(pd.received):
            pass
        return await chat(instance, request, received)

    pd.answer = when_encoded
    front = await start([*encoders, pd])
    for number in range(CALLS):
        assert (await front.post(ask(image(image_bytes(f"#{number:06x}"))))).status == 200
    for one in encoders:
        while not one.arrived.locked():
            await one.arrived.acquire()
        one.received.clear()
        one.answer = never
    await until_idle(front)
    pd.told.clear()
    return Race(front, encoders, pd)


def place(instance: FakeInstance) -> ECPlace | None:
    assert instance.health is not None
    return instance.health.ec_place


async def test_the_second_encoder_answers_for_one_that_hangs(race: Race) -> None:
    answered = asyncio.Event()

    async def when_told_twice(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        await instance.until_heard(lambda: len(instance.told) == 2)
        return await chat(instance, request, received)

    async def answer(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        if len([one for one in race.encoders if one.received]) < 2:
            return await never(instance, request, received)
        assert place(instance) not in race.pd.places.values()
        answered.set()
        return await encode(instance, request, received)

    race.pd.answer = when_told_twice
    for one in race.encoders:
        one.answer = answer
    request, first, second = await race.begin()
    assert (await request).status == 200
    assert answered.is_set()
    await asyncio.wait_for(first.gone.acquire(), 60)
    assert [list(message.places.values()) for message in race.pd.told] == [[place(first)], [place(second)]]
    await race.ended()
    assert await race.outcomes() == (1, 0)
    assert [len(one.received) for one in race.encoders] == [1, 1]


async def test_a_hedge_ends_when_the_first_encoder_answers_after_all(race: Race) -> None:
    async def after_the_other(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        if len([one for one in race.encoders if one.received]) == 2:
            return await never(instance, request, received)
        async with asyncio.timeout(60):
            while len([one for one in race.encoders if one.received]) < 2:
                await race.front.get("/health")
        return await encode(instance, request, received)

    for one in race.encoders:
        one.answer = after_the_other
    request, first, second = await race.begin()
    assert (await request).status == 200
    await asyncio.wait_for(second.gone.acquire(), 60)
    await race.ended()
    assert await race.outcomes() == (0, 1)
    assert set(race.pd.places.values()) == {place(first)}


async def test_a_hedge_takes_over_from_an_encoder_that_fails(race: Race) -> None:
    """Nothing is encoded a third time, and the PD learns where the embedding will be."""
    failing = asyncio.Event()

    async def fail(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        if len([one for one in race.encoders if one.received]) == 2:
            await race.pd.until_heard(lambda: place(instance) in race.pd.places.values())
            return await encode(instance, request, received)
        await failing.wait()
        await break_off(request)
        raise ConnectionError

    for one in race.encoders:
        one.answer = fail
    request, _, second = await race.begin()
    failing.set()
    assert (await request).status == 200
    await race.ended()
    assert await race.outcomes() == (1, 0)
    assert [len(one.received) for one in race.encoders] == [1, 1]
    assert await race.front.metric("chiasm_proxy_encode_retries_total") == 0
    assert list(race.pd.places.values()) == [place(second)]


async def test_both_calls_end_when_the_client_leaves(race: Race) -> None:
    race.pd.answer = never
    request, first, second = await race.begin()
    request.cancel()
    for one in (first, second):
        await asyncio.wait_for(one.gone.acquire(), 60)
    await race.ended()
    assert await race.outcomes() == (0, 1)
