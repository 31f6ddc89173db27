"""Instances that join a running proxy, with the very code by which real ones do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from chiasm.fleet_key import FleetKey, make_fleet_key, read_fleet_key
from chiasm.http.fleet_calls import body_digest, signature
from chiasm.launch.drain import Drain, NotDrainedError
from chiasm.proxy import waiting
from chiasm.server.joining import Joiner
from chiasm.wire import DRAIN_PATH, LEASE_PATH, DrainOrder, Lease, LeaseAnswer, Load

from .conftest import Answer, Front, Start, ask, image, image_bytes
from .instances import FakeInstance, after, chat, never


class Member:
    """A fake instance that has joined a proxy."""

    def __init__(self, role: str, **health: Any) -> None:
        self.instance = FakeInstance(role, **{"incarnation": f"{role}-1"} | health)
        self.status = "ok"
        self.load = Load(requests=3)
        self.joiner: Joiner

    def lease(self) -> Lease:
        assert self.instance.health is not None
        return Lease(
            url=self.instance.url,
            role=self.instance.role,
            incarnation=self.instance.health.incarnation,
            status=self.status,
            load=self.load,
        )


Join = Callable[..., Awaitable[Member]]


@pytest.fixture
async def join() -> AsyncIterator[Join]:
    """``await join(front, role)`` starts an instance that joins a proxy."""
    async with AsyncExitStack() as stack:

        async def join_one(front: Front, role: str, *, key: FleetKey | None = None, **health: Any) -> Member:
            member = Member(role, **health)
            await member.instance.start()
            stack.push_async_callback(member.instance.kill)
            member.joiner = Joiner([front.url], key, member.lease)
            member.joiner.start()
            stack.push_async_callback(member.joiner.close)
            return member

        yield join_one


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    file = tmp_path / "fleet.key"
    file.touch(0o600)
    file.write_text(make_fleet_key())
    return file


async def send(front: Front, lease: Lease, key: FleetKey | None = None, **options: Any) -> Answer:
    body = msgspec.json.encode(lease)
    headers = {} if key is None else signature(key, "POST", LEASE_PATH, body_digest(body), **options)
    return await front.post(body, LEASE_PATH, **headers)


async def test_a_proxy_starts_without_instances_and_serves_those_that_join(start: Start, join: Join) -> None:
    front = await start([])
    assert (await front.get("/health")).status == 503
    pd, encoder = await join(front, "pd"), await join(front, "encoder")
    for member in (pd, encoder):
        await front.until(member.instance, "healthy")
    assert (await front.post(ask(image(image_bytes())))).status == 200
    assert [len(one.instance.received) for one in (pd, encoder)] == [1, 1]
    (described,) = [one for one in (await front.get("/health")).json["instances"] if one["role"] == "pd"]
    assert (described["sources"], described["load"]) == (["lease"], {"requests": 3})


async def test_requests_go_where_others_have_given_less_work(start: Start, join: Join) -> None:
    front = await start([])
    busy, idle = await join(front, "pd"), await join(front, "pd", incarnation="pd-2")
    for member in (busy, idle):
        await front.until(member.instance, "healthy")
    busy.load = Load(outstanding_seconds=1000.0)
    await busy.joiner.tell()
    for _ in range(3):
        assert (await front.post(ask("x"))).status == 200
    assert (len(busy.instance.received), len(idle.instance.received)) == (0, 3)


async def test_an_instance_that_drains_gets_no_new_work_from_the_moment_at_which_it_has_told_so(
    start: Start, join: Join
) -> None:
    gate = asyncio.Event()

    front = await start([])
    leaving, staying = await join(front, "pd"), await join(front, "pd", incarnation="pd-2")
    for member in (leaving, staying):
        await front.until(member.instance, "healthy")
    leaving.instance.answer = staying.instance.answer = after(gate, chat)
    running = [asyncio.ensure_future(front.post(ask("x"))) for _ in range(2)]
    await leaving.instance.arrived.acquire()
    leaving.status = "draining"
    await leaving.joiner.tell()
    assert (await front.states())[leaving.instance.url] == "draining"
    running += [asyncio.ensure_future(front.post(ask("x"))) for _ in range(4)]
    for _ in range(5):
        await staying.instance.arrived.acquire()
    gate.set()
    assert {answer.status for answer in await asyncio.gather(*running)} == {200}
    assert len(leaving.instance.received) == 1
    await leaving.joiner.close()
    assert (await front.states()) == {staying.instance.url: "healthy"}


async def test_what_a_draining_instance_had_goes_elsewhere_when_it_is_killed(start: Start, join: Join) -> None:
    front = await start([])
    leaving = await join(front, "pd")
    await front.until(leaving.instance, "healthy")
    leaving.instance.answer = never
    running = asyncio.ensure_future(front.post(ask("x")))
    await leaving.instance.arrived.acquire()
    staying = await join(front, "pd", incarnation="pd-2")
    await front.until(staying.instance, "healthy")
    leaving.status = "draining"
    await leaving.joiner.tell()
    await leaving.instance.kill()
    assert (await running).status == 200
    assert len(staying.instance.received) == 1


async def test_the_proxy_that_is_told_to_drain_an_instance_gives_it_no_more_work(start: Start, key_file: Path) -> None:
    leaving, staying = FakeInstance("pd"), FakeInstance("pd")
    front = await start([leaving, staying], fleet_key_file=key_file, admin_key="operator" * 2)
    order = msgspec.json.encode(DrainOrder(url=leaving.url))
    assert (await front.post(order, DRAIN_PATH)).status == 401
    stranger = signature(FleetKey([make_fleet_key()]), "POST", DRAIN_PATH, body_digest(order))
    assert (await front.post(order, DRAIN_PATH, **stranger)).status == 403
    assert (await front.post(order, DRAIN_PATH, **front.admin)).status == 202
    assert leaving.drains == 1
    assert (await front.states())[leaving.url] == "draining"
    key = read_fleet_key(key_file)
    assert key is not None
    signed = signature(key, "POST", DRAIN_PATH, body_digest(order))
    assert (await front.post(order, DRAIN_PATH, **signed)).status == 202
    for _ in range(3):
        assert (await front.post(ask("x"))).status == 200
    assert (len(leaving.received), len(staying.received)) == (0, 3)
    unknown = msgspec.json.encode(DrainOrder(url="http://127.0.0.1:1"))
    assert (await front.post(unknown, DRAIN_PATH, **front.admin)).status == 404


@pytest.mark.parametrize("said", [b"no JSON", b"[]", b'{"incarnation": "\xff"}', b'{"x":' + b"[" * 10_000])
async def test_an_instance_whose_answer_to_a_drain_is_not_understood_is_named(start: Start, said: bytes) -> None:
    leaving = FakeInstance("pd")
    leaving.drain_body = said
    front = await start([leaving], admin_key="operator" * 2)
    answer = await front.post({"url": leaving.url}, DRAIN_PATH, **front.admin)
    assert (answer.status, answer.error["type"]) == (502, "upstream_error")
    assert answer.error["message"].startswith(f"{leaving.url} answers with status 202, and not as chiasm does")
    async with Drain(leaving.url, proxy=front.url, admin_key="operator" * 2) as drain:
        with pytest.raises(NotDrainedError, match=f"{leaving.url} answers with status 202"):
            await drain.begin()


async def test_an_instance_that_does_not_answer_to_a_drain_is_not_waited_for(start: Start) -> None:
    leaving = FakeInstance("pd")
    leaving.heeds_drains.clear()
    front = await start([leaving], admin_key="operator" * 2, probe_timeout_seconds=0.5)
    answer = await front.post({"url": leaving.url}, DRAIN_PATH, **front.admin)
    assert answer.status == 502
    assert answer.error["message"].startswith(f"{leaving.url} does not answer")


@pytest.mark.parametrize("has_key", [False, True])
async def test_a_proxy_is_not_drained_and_says_that_it_is_one(start: Start, key_file: Path, has_key: bool) -> None:
    front = await start([FakeInstance("pd")], fleet_key_file=key_file if has_key else None)
    async with Drain(front.url, key=read_fleet_key(key_file) if has_key else None) as drain:
        with pytest.raises(NotDrainedError, match=f"{front.url} is a proxy. Name the instance"):
            await drain.begin()


@pytest.mark.parametrize("hours", [-1, 1])
async def test_a_drain_is_asked_of_a_proxy_by_its_own_clock(start: Start, key_file: Path, hours: int) -> None:
    leaving = FakeInstance("pd", incarnation="pd-1")
    front = await start([leaving], fleet_key_file=key_file)
    front.service.clock = lambda: time.time() + 3600 * hours
    async with Drain(leaving.url, key=read_fleet_key(key_file), proxy=front.url) as drain:
        assert (await drain.begin()).incarnation == "pd-1"
    assert (await front.states())[leaving.url] == "draining"


async def test_an_instance_that_drains_while_its_proxy_is_down_gets_nothing_from_the_next_one(
    start: Start, join: Join
) -> None:
    first = await start([])
    leaving, staying = await join(first, "pd"), await join(first, "pd", incarnation="pd-2")
    for member in (leaving, staying):
        await first.until(member.instance, "healthy")
    port = int(first.url.rpartition(":")[2])
    await first.stop()
    async with Drain(leaving.instance.url, proxy=first.url) as drain:
        with pytest.raises(NotDrainedError, match="can't be reached"):
            await drain.begin()
    leaving.status = "draining"
    await leaving.joiner.tell()
    second = await start([], port=port)
    await second.until(leaving.instance, "draining")
    await second.until(staying.instance, "healthy")
    assert (await second.post(ask("x"))).status == 200
    assert not leaving.instance.received
    await leaving.joiner.close()
    assert (await second.states()) == {staying.instance.url: "healthy"}


async def test_an_instance_that_has_become_ready_tells_so_at_once(start: Start, join: Join) -> None:
    front = await start([], probe_interval_seconds=1000.0)
    member = await join(front, "pd")
    member.instance.health_status, member.status = 503, "starting"
    await front.until(member.instance, "starting")
    member.instance.health_status, member.status = 200, "ok"
    await member.joiner.tell()
    await front.until(member.instance, "healthy")


async def test_a_killed_instance_is_noticed_by_the_connection_on_which_it_waits(start: Start, join: Join) -> None:
    front = await start([], probe_interval_seconds=1000.0)
    member = await join(front, "pd")
    await front.until(member.instance, "healthy")
    while not front.service.leases._news:
        await front.states()
    probes = member.instance.probes
    await member.instance.kill()
    member.joiner._lines[front.url, "127.0.0.1"]._task.cancel()
    await front.until(member.instance, "unhealthy")
    assert member.instance.probes == probes


async def test_a_restarted_proxy_knows_its_instances_again(start: Start, join: Join) -> None:
    first = await start([])
    member = await join(first, "pd")
    await first.until(member.instance, "healthy")
    port = int(first.url.rpartition(":")[2])
    await first.stop()
    second = await start([], port=port)
    await second.until(member.instance, "healthy")
    assert (await second.post(ask("x"))).status == 200


async def test_a_proxy_that_has_just_started_lets_requests_wait_for_instances_that_join(
    start: Start, join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "_JOIN_SECONDS", 60.0)
    front = await start([], wait_for_instance_seconds=60.0)
    request = asyncio.ensure_future(front.post(ask(image(image_bytes()))))
    while not await front.metric('chiasm_proxy_requests_waiting{reason="instance"}'):
        pass
    await join(front, "pd")
    await join(front, "encoder")
    assert (await request).status == 200


@pytest.mark.parametrize("has_ended", [False, True])
async def test_requests_wait_for_what_takes_the_place_of_the_last_instance_that_drains(
    start: Start, join: Join, has_ended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "_JOIN_SECONDS", 0.0)
    front = await start([], wait_for_instance_seconds=60.0, probe_interval_seconds=60.0)
    member = await join(front, "pd")
    await front.until(member.instance, "healthy")
    member.status = "draining"
    member.joiner.change()
    await front.until(member.instance, "draining")
    if has_ended:
        await member.joiner.close()
        assert await front.states() == {}
    request = asyncio.ensure_future(front.post(ask("x")))
    while not request.done() and not await front.metric('chiasm_proxy_requests_waiting{reason="instance"}'):
        pass
    await join(front, "pd", incarnation="pd-2")
    assert (await request).status == 200


async def test_it_does_not_wait_for_long_for_what_may_never_join(
    start: Start, join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "_JOIN_SECONDS", 0.2)
    front = await start([], wait_for_instance_seconds=1000.0)
    await front.until((await join(front, "pd")).instance, "healthy")
    answer = await front.post(ask(image(image_bytes())))
    assert (answer.status, answer.error["code"]) == (503, "no_encoder")


async def test_every_proxy_knows_every_instance_and_the_end_of_one_is_nothing_to_the_others(
    start: Start, join: Join
) -> None:
    fronts = [await start([]) for _ in range(3)]
    member = await join(fronts[0], "pd")
    others = Joiner([front.url for front in fronts[1:]], None, member.lease)
    others.start()
    for front in fronts:
        await front.until(member.instance, "healthy")
    await fronts[0].stop()
    assert [(await front.post(ask("x"))).status for front in fronts[1:]] == [200, 200]
    await others.close()


async def test_a_joiner_with_another_model_is_told_so_and_gets_no_work(
    start: Start, join: Join, caplog: pytest.LogCaptureFixture
) -> None:
    front = await start([])
    await front.until((await join(front, "pd")).instance, "healthy")
    with caplog.at_level("WARNING", "chiasm.server.joining"):
        other = await join(front, "pd", incarnation="pd-2", model="other")
        await front.until(other.instance, "mismatched")
        await other.joiner.tell()
    assert "mismatched: it serves other, but the fleet serves tiny" in caplog.text


async def test_a_joiner_without_the_fleet_key_or_with_another_one_is_refused(start: Start, key_file: Path) -> None:
    front = await start([], fleet_key_file=key_file)
    instance = await FakeInstance("pd", incarnation="1").start()
    lease = Lease(url=instance.url, role="pd", incarnation="1", status="ok")
    without = await send(front, lease)
    assert (without.status, without.error["code"]) == (403, "fleet_key_needed")
    wrong = await send(front, lease, FleetKey([make_fleet_key()]))
    assert (wrong.status, wrong.error["code"]) == (403, "fleet_signature_invalid")
    assert await front.states() == {}
    assert (await send(front, lease, read_fleet_key(key_file))).json["state"] == "healthy"
    await instance.kill()


async def test_an_instance_whose_clock_is_an_hour_off_joins_all_the_same(
    start: Start, join: Join, key_file: Path
) -> None:
    front = await start([], fleet_key_file=key_file)
    front.service.clock = lambda: time.time() + 3600
    member = await join(front, "pd", key=read_fleet_key(key_file))
    await front.until(member.instance, "healthy")
    front.service.clock = lambda: time.time() - 3600  # it is set
    await member.joiner.tell()
    await front.until(member.instance, "healthy")
    assert (await front.get("/health")).status == 200


async def test_without_a_fleet_key_only_instances_of_this_machine_join(start: Start) -> None:
    front = await start([])
    answer = await send(front, Lease(url="http://10.0.0.5:8001", role="pd", incarnation="1", status="ok"))
    assert (answer.status, answer.error["code"]) == (403, "fleet_key_needed")
    assert await front.states() == {}


@pytest.mark.parametrize(
    "said",
    [
        {"X-Forwarded-For": "192.0.2.1"},
        {"X-Forwarded-For": "127.0.0.1"},  # as a client gave it, whom the reverse proxy believes
        {"X-Real-IP": "192.0.2.1"},
        {"Forwarded": "for=192.0.2.1"},
    ],
)
async def test_without_a_fleet_key_nobody_joins_through_a_reverse_proxy_on_this_machine(
    start: Start, said: dict[str, str]
) -> None:
    front = await start([])
    instance = await FakeInstance("pd", incarnation="1").start()
    lease = Lease(url=instance.url, role="pd", incarnation="1", status="ok")
    body = msgspec.json.encode(lease)
    answer = await front.post(body, LEASE_PATH, **said)
    assert (answer.status, answer.error["code"]) == (403, "fleet_key_needed")
    assert await front.states() == {}
    assert (await front.post(body, LEASE_PATH)).status == 200
    await instance.kill()


async def test_a_process_that_was_replaced_at_its_url_gets_no_lease(start: Start) -> None:
    front = await start([])
    instance = await FakeInstance("pd", incarnation="new").start()
    old = Lease(url=instance.url, role="pd", incarnation="old", status="ok")
    refused = await send(front, old)
    assert refused.status == 409
    assert "Another process" in refused.error["message"]
    assert await front.states() == {}
    assert (await send(front, replace(old, incarnation="new"))).json["state"] == "healthy"
    assert (await send(front, old)).status == 409
    assert (await send(front, replace(old, leaves=True))).status == 200
    assert await front.states() == {instance.url: "healthy"}
    await instance.kill()


@pytest.mark.parametrize("answers_with_it", [False, True])
async def test_who_claims_the_incarnation_of_another_at_a_url_of_its_own_gets_no_work_and_harms_nobody(
    start: Start, join: Join, answers_with_it: bool
) -> None:
    front = await start([])
    member = await join(front, "pd")
    await front.until(member.instance, "healthy")
    thief = await FakeInstance("pd", incarnation="pd-1" if answers_with_it else "own").start()
    stolen = replace(member.lease(), url=thief.url)
    answer = await send(front, stolen)
    if answers_with_it:
        assert answer.json["state"] == "mismatched"
        assert f"the same process as {member.instance.url}" in answer.json["reason"]
    else:
        assert answer.status == 409
    for _ in range(3):
        assert (await front.post(ask("x"))).status == 200
    assert not thief.received
    assert (await send(front, replace(stolen, leaves=True))).status == 200
    assert await front.states() == {member.instance.url: "healthy"}
    await thief.kill()


async def test_a_restarted_instance_takes_the_place_of_its_predecessor(start: Start) -> None:
    front = await start([])
    instance = await FakeInstance("pd", incarnation="old").start()
    lease = Lease(url=instance.url, role="pd", incarnation="old", status="ok")
    assert (await send(front, lease)).json["state"] == "healthy"
    assert instance.health is not None
    instance.health = replace(instance.health, incarnation="new")
    assert (await send(front, replace(lease, incarnation="new"))).json["state"] == "healthy"
    assert len(await front.states()) == 1
    await instance.kill()


@pytest.mark.parametrize(
    "wrong",
    [{"url": "ftp://a"}, {"url": ""}, {"role": "judge"}, {"role": ""}, {"incarnation": ""}],
)
async def test_malformed_leases_are_refused(start: Start, wrong: dict[str, str]) -> None:
    front = await start([])
    lease = Lease(url="http://127.0.0.1:1", role="pd", incarnation="1", status="ok")
    answer = await send(front, replace(lease, **wrong))
    assert (answer.status, answer.error["param"]) == (400, next(iter(wrong)))


async def test_anybody_may_ask_the_clock_of_a_proxy(start: Start, key_file: Path) -> None:
    front = await start([], fleet_key_file=key_file)
    key = read_fleet_key(key_file)
    assert key is not None
    answer = msgspec.json.decode((await front.get(LEASE_PATH)).body, type=LeaseAnswer)
    assert answer.fleet_keys == list(key.names)
    assert answer.clock_milliseconds > 0
