"""EndpointSlices, from a server that speaks the API's language and misbehaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web

from chiasm.proxy.discovery.endpoint_slices import EndpointSlice, Reading, instances_of
from chiasm.proxy.discovery.kubernetes import Api, KubernetesSource, Pace
from chiasm.tasks import end_tasks
from chiasm.wire import Role

from .test_file_and_dns import Heard

PATIENT = Pace(silence_seconds=600, answer_seconds=600, first_delay_seconds=0.001, longest_delay_seconds=0.01)
"""No watch is given up because the machine is busy."""
IMPATIENT = replace(PATIENT, silence_seconds=0.5)


def endpoint(address: str, *, uid: str = "", **conditions: bool) -> dict[str, Any]:
    target = {"targetRef": {"kind": "Pod", "uid": uid}} if uid else {}
    return {"addresses": [address], "conditions": conditions or {"ready": True}} | target


def slice_of(name: str, *endpoints: dict[str, Any], version: int = 1, **more: Any) -> dict[str, Any]:
    labels = {"llm-d.ai/role": "encode"}
    return {
        "kind": "EndpointSlice",
        "metadata": {"name": name, "resourceVersion": str(version), "labels": labels},
        "addressType": "IPv4",
        "endpoints": list(endpoints),
        "ports": [{"name": "metrics", "port": 9000}, {"name": "http", "port": 8001}],
    } | more


def event(kind: str, content: dict[str, Any]) -> bytes:
    return json.dumps({"type": kind, "object": content}).encode() + b"\n"


def bookmark(version: int) -> bytes:
    return event("BOOKMARK", {"kind": "EndpointSlice", "metadata": {"resourceVersion": str(version)}})


def gone() -> bytes:
    return event("ERROR", {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"})


class Server:
    """An API server whose lists and watches a test scripts."""

    def __init__(self) -> None:
        self.slices: list[dict[str, Any]] = []
        self.version = 1
        self.status = 200
        """Of all answers."""
        self.page = 100
        self.ends_watches = False
        """Whether it ends each watch at once."""
        self.tokens: list[str] = []
        """What each call was made with."""
        self._called = asyncio.Condition()
        self.lists = 0
        self.versions: list[str] = []
        """From which each watch went on."""
        self.watches: asyncio.Queue[asyncio.Queue[bytes | None]] = asyncio.Queue()
        """The watches that have begun; what is put there is sent, and None ends one."""
        self.url = ""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.tokens.append(request.headers["Authorization"])
        async with self._called:
            self._called.notify_all()
        assert request.query["labelSelector"] == "app=chiasm,tier in (e)"
        if self.status != 200:
            return web.Response(status=self.status)
        if "watch" not in request.query:
            self.lists += 1
            start = int(request.query.get("continue", 0))
            more = {"continue": str(start + self.page)} if start + self.page < len(self.slices) else {}
            metadata = {"resourceVersion": str(self.version)} | more
            return web.json_response({"metadata": metadata, "items": self.slices[start : start + self.page]})
        assert request.query["allowWatchBookmarks"] == "true"
        self.versions.append(request.query["resourceVersion"])
        response = web.StreamResponse()
        await response.prepare(request)
        if self.ends_watches:
            return response
        events: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.watches.put_nowait(events)
        while (sent := await events.get()) is not None:
            await response.write(sent)
        return response

    async def until_called(self, times: int) -> None:
        """Return when so many calls have come, in all."""
        async with asyncio.timeout(60), self._called:
            await self._called.wait_for(lambda: len(self.tokens) >= times)

    async def watch(self) -> asyncio.Queue[bytes | None]:
        return await asyncio.wait_for(self.watches.get(), 60)


@asynccontextmanager
async def serving(server: Server, port: int = 0) -> AsyncIterator[None]:
    application = web.Application()
    application.router.add_get("/apis/discovery.k8s.io/v1/namespaces/models/endpointslices", server.answer)
    runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=0, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, reuse_address=True).start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield
    finally:
        await runner.cleanup()


class Watching:
    """A source that watches a server, and what it tells."""

    def __init__(self, server: Server, account: Path, heard: Heard) -> None:
        self.server = server
        self.account = account
        self._heard = heard

    async def urls(self) -> list[str]:
        """The hosts of what the source tells next."""
        return [one.url.removeprefix("http://").removesuffix(":8001") for one in await self._heard.next()]

    @property
    def is_silent(self) -> bool:
        return self._heard.is_silent


@pytest.fixture
def pace() -> Pace:
    return PATIENT


@pytest.fixture
async def watching(tmp_path: Path, pace: Pace) -> AsyncIterator[Watching]:
    (tmp_path / "token").write_text("first\n")
    (tmp_path / "namespace").write_text("models")
    server, heard = Server(), Heard()
    server.slices = [slice_of("a", endpoint("10.0.0.5"))]
    async with serving(server):
        api = Api(server.url, tmp_path)
        source = KubernetesSource("k8s:x", api, "app=chiasm,tier in (e)", api.namespace(), Reading(), pace)
        task = asyncio.create_task(source.run(heard))
        yield Watching(server, tmp_path, heard)
        await end_tasks(task)


# ---- slices ------------------------------------------------------------------------------------------------------------


def read(*slices: dict[str, Any], reading: Reading = Reading()) -> list[tuple[str, Role | None, bool]]:  # noqa: B008
    return [tuple(one) for one in instances_of([msgspec.convert(each, EndpointSlice) for each in slices], reading)]  # type: ignore[misc]


def test_conditions_say_which_endpoints_serve_and_which_end() -> None:
    found = read(
        slice_of(
            "a",
            endpoint("10.0.0.1"),
            endpoint("10.0.0.2", serving=True, terminating=False),
            endpoint("10.0.0.3", ready=False, serving=True, terminating=True),
            endpoint("10.0.0.4", ready=False, serving=False, terminating=True),
            endpoint("10.0.0.5", ready=False, serving=False),
        )
    )
    assert [(url[11:-5], is_ending) for url, _, is_ending in found] == [
        (".0.1", False),
        (".0.2", False),
        (".0.3", True),
    ]


def test_the_port_is_the_one_that_is_named_or_called_http_or_the_first() -> None:
    one = slice_of("a", endpoint("10.0.0.1"))
    ports = {wanted: read(one, reading=Reading(wanted))[0][0].rpartition(":")[2] for wanted in ("", "metrics", "7")}
    assert ports == {"": "8001", "metrics": "9000", "7": "7"}
    assert read(one, reading=Reading("other")) == []
    assert read(slice_of("a", endpoint("10.0.0.1"), ports=[{"name": "", "port": 5}]))[0][0] == "http://10.0.0.1:5"
    assert read(slice_of("a", endpoint("10.0.0.1"), ports=None)) == []


def test_the_role_is_that_of_the_argument_or_of_the_label_or_unknown() -> None:
    one = slice_of("a", endpoint("10.0.0.1"))
    assert read(one)[0][1] is Role.ENCODER
    assert read(one, reading=Reading(role=Role.PD))[0][1] is Role.PD
    one["metadata"]["labels"] = {"llm-d.ai/role": "prefill-decode"}
    assert read(one)[0][1] is Role.PD
    one["metadata"]["labels"] = None
    assert read(one)[0][1] is None


def test_a_pod_counts_once_also_in_several_slices_and_by_addresses_of_two_kinds() -> None:
    found = read(
        slice_of("c", endpoint("fd00::1", uid="p"), addressType="IPv6"),
        slice_of("a", endpoint("10.0.0.1", uid="p", serving=True, terminating=True)),
        slice_of("b", endpoint("10.0.0.1", uid="p")),
    )
    assert found == [("http://10.0.0.1:8001", Role.ENCODER, False)]
    assert read(slice_of("c", endpoint("fd00::1"), addressType="IPv6"))[0][0] == "http://[fd00::1]:8001"


# ---- the watch ---------------------------------------------------------------------------------------------------------


async def test_slices_are_listed_page_by_page_and_then_watched(watching: Watching) -> None:
    server = watching.server
    assert await watching.urls() == ["10.0.0.5"]
    events = await server.watch()
    events.put_nowait(event("ADDED", slice_of("b", endpoint("10.0.0.6"), version=2)))
    assert await watching.urls() == ["10.0.0.5", "10.0.0.6"]
    events.put_nowait(event("MODIFIED", slice_of("b", endpoint("10.0.0.7"), version=3)))
    assert await watching.urls() == ["10.0.0.5", "10.0.0.7"]
    events.put_nowait(event("DELETED", slice_of("a", version=4)))
    assert await watching.urls() == ["10.0.0.7"]
    server.slices, server.page = [slice_of(str(host), endpoint(f"10.0.1.{host}")) for host in range(5)], 2
    events.put_nowait(gone())
    assert await watching.urls() == [f"10.0.1.{host}" for host in range(5)]
    assert server.lists == 1 + 3


async def test_a_watch_that_ends_goes_on_from_the_last_event_or_bookmark(watching: Watching) -> None:
    server = watching.server
    await watching.urls()
    for sent in (event("MODIFIED", slice_of("a", endpoint("10.0.0.5"), version=2)), bookmark(9)):
        events = await server.watch()
        events.put_nowait(sent)
        events.put_nowait(None)
    await server.watch()
    assert server.versions == ["1", "2", "9"]
    assert server.lists == 1


async def test_what_follows_the_last_whole_line_is_not_used_and_comes_again(watching: Watching) -> None:
    server = watching.server
    await watching.urls()
    whole = event("ADDED", slice_of("b", endpoint("10.0.0.6"), version=2))
    events = await server.watch()
    events.put_nowait(whole[:-9])
    events.put_nowait(None)
    events = await server.watch()
    assert watching.is_silent
    assert server.versions == ["1", "1"]
    for byte in whole:
        events.put_nowait(bytes([byte]))
    assert await watching.urls() == ["10.0.0.5", "10.0.0.6"]


@pytest.mark.parametrize("line", [b"{nonsense}\n", b'{"type": "ADDED", "object": []}\n', b"\xff\n"])
async def test_a_line_that_is_not_understood_ends_the_watch_and_not_the_source(watching: Watching, line: bytes) -> None:
    await watching.urls()
    (await watching.server.watch()).put_nowait(line)
    (await watching.server.watch()).put_nowait(event("DELETED", slice_of("a", version=2)))
    assert await watching.urls() == []


async def test_when_the_version_is_gone_the_slices_are_listed_again(watching: Watching) -> None:
    server = watching.server
    await watching.urls()
    events = await server.watch()
    server.slices, server.version = [slice_of("z", endpoint("10.0.0.9"))], 50
    events.put_nowait(gone())
    assert await watching.urls() == ["10.0.0.9"]
    events = await server.watch()
    server.status = 410
    events.put_nowait(None)
    await server.until_called(6)  # a watch and a list are refused
    server.status = 200
    assert await watching.urls() == ["10.0.0.9"]
    await server.watch()
    assert server.versions == ["1", "50", "50"]


@pytest.mark.parametrize("pace", [IMPATIENT], ids=["impatient"])
async def test_a_watch_that_hangs_is_given_up_and_goes_on(watching: Watching) -> None:
    await watching.urls()
    await watching.server.watch()
    events = await watching.server.watch()
    events.put_nowait(event("DELETED", slice_of("a", version=2)))
    assert await watching.urls() == []
    assert set(watching.server.versions[:2]) == {"1"}


@pytest.mark.parametrize("status", [401, 403, 429, 500, 503])
async def test_while_the_server_is_gone_everything_stays_and_it_is_asked_again(watching: Watching, status: int) -> None:
    server = watching.server
    await watching.urls()
    events = await server.watch()
    server.status = status
    events.put_nowait(event("ERROR", {"code": 500, "message": "etcd is away"}))
    await server.until_called(12)
    assert watching.is_silent
    server.status = 200
    (await server.watch()).put_nowait(event("ADDED", slice_of("b", endpoint("10.0.0.6"), version=2)))
    assert await watching.urls() == ["10.0.0.5", "10.0.0.6"]
    assert server.lists == 1


async def test_a_server_that_forbids_it_makes_the_log_say_what_the_account_may_not(
    watching: Watching, caplog: pytest.LogCaptureFixture
) -> None:
    await watching.urls()
    events = await watching.server.watch()
    watching.server.status = 403
    events.put_nowait(event("ERROR", {"code": 410}))
    await watching.server.until_called(6)
    assert "may list and watch endpointslices of discovery.k8s.io" in caplog.text


async def test_the_token_is_read_again_for_each_call(watching: Watching) -> None:
    await watching.urls()
    events = await watching.server.watch()
    (watching.account / "token").write_text("second")
    events.put_nowait(None)
    await watching.server.watch()
    assert watching.server.tokens == ["Bearer first", "Bearer first", "Bearer second"]


class Clock:
    """Time that passes as fast as somebody sleeps; ``until`` sets an event when it has come so far."""

    def __init__(self, until: float) -> None:
        self.now = 0.0
        self.sleeps = 0
        self._until = until
        self.has_come = asyncio.Event()
        self.may_pass = asyncio.Event()

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.sleeps += 1
        if self.now >= self._until:
            self.has_come.set()
            await self.may_pass.wait()
        await asyncio.sleep(0)


async def test_a_server_that_refuses_connections_for_a_minute_changes_nothing_and_is_asked_less_and_less_often(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "token").write_text("first\n")
    server, heard, clock = Server(), Heard(), Clock(until=60)
    server.slices = [slice_of("a", endpoint("10.0.0.5"))]
    async with serving(server):
        source = KubernetesSource(
            "k8s:x", Api(server.url, tmp_path), "app=chiasm,tier in (e)", "models", Reading(), sleep=clock.sleep
        )
        task = asyncio.create_task(source.run(heard))
        assert len(await heard.next()) == 1
        events = await server.watch()
        events.put_nowait(bookmark(7))
        events.put_nowait(None)
        (await server.watch()).put_nowait(None)
    await asyncio.wait_for(clock.has_come.wait(), 60)
    assert clock.sleeps < 20
    assert heard.is_silent
    assert caplog.text.count("the API server can't be watched") == 1
    async with serving(server, int(server.url.rpartition(":")[2])):
        clock.may_pass.set()
        (await server.watch()).put_nowait(event("ADDED", slice_of("b", endpoint("10.0.0.6"), version=8)))
        assert len(await heard.next()) == 2
        assert set(server.versions[1:]) == {"7"}
        assert server.lists == 1
        await end_tasks(task)


async def test_a_server_that_ends_each_watch_at_once_is_asked_less_and_less_often(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("first\n")
    server, heard, clock = Server(), Heard(), Clock(until=60)
    server.ends_watches = True
    async with serving(server):
        source = KubernetesSource(
            "k8s:x", Api(server.url, tmp_path), "app=chiasm,tier in (e)", "models", Reading(), sleep=clock.sleep
        )
        task = asyncio.create_task(source.run(heard))
        await asyncio.wait_for(clock.has_come.wait(), 60)
        assert len(server.versions) < 20
        await end_tasks(task)
