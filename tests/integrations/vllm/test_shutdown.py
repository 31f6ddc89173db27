"""How vLLM's server ends under chiasm's middleware."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from functools import partial
from types import SimpleNamespace

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chiasm.integrations.vllm.messages import UNFETCHED_METHOD
from chiasm.integrations.vllm.middleware import ChiasmMiddleware
from chiasm.integrations.vllm.shutdown import ServerEnd
from chiasm.wire import COMPLETIONS_PATH, DRAIN_PATH, NAMED_EVENT_PATHS

FIRST, LAST = b"data: one\n\n", b"data: [DONE]\n\n"


class Engines:
    """vLLM's client of two engines, which have work until they are let go."""

    errored = False

    def __init__(self) -> None:
        self.engine_core = self
        self.unfetched = [0, 0]
        """Embeddings that others have yet to fetch from each."""
        self.is_paused = asyncio.Event()
        self.go = asyncio.Event()
        self.go.set()

    async def call_utility_all_async(self, method: str) -> list[int]:
        assert method == UNFETCHED_METHOD
        return list(self.unfetched)

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        assert (mode, clear_cache) == ("wait", False)
        self.is_paused.set()
        await self.go.wait()


class VLLM:
    """vLLM's server, with an application that streams until it is let go."""

    def __init__(self, shutdown_timeout: int, api_server_count: int | None = None) -> None:
        self.server = SimpleNamespace(should_exit=False)
        self.engines = Engines()
        transfer = SimpleNamespace(
            ec_connector_module_path="chiasm.integrations.vllm.ec_connector",
            ec_connector_extra_config={"connector": "TcpConnector"},
        )
        self.state = SimpleNamespace(
            vllm_config=SimpleNamespace(shutdown_timeout=shutdown_timeout, ec_transfer_config=transfer),
            args=SimpleNamespace(api_server_count=api_server_count),
            server=self.server,
            engine_client=self.engines,
        )
        self.app = SimpleNamespace(state=self.state)
        self.go = asyncio.Event()
        self.was_cancelled = False
        self.middleware: ASGIApp = ChiasmMiddleware(self)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        if scope["method"] == "GET":
            await send({"type": "http.response.start", "status": 500, "headers": []})
            return
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": FIRST, "more_body": True})
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise
        await send({"type": "http.response.body", "body": LAST, "more_body": False})

    async def call(self, kind: str, method: str = "POST", path: str = COMPLETIONS_PATH) -> list[Message]:
        """Call the middleware; return what it sends."""
        sent: list[Message] = []

        async def receive() -> Message:
            return {"type": "http.request", "body": b"{}", "more_body": False}

        async def send(message: Message) -> None:
            sent.append(message)
            await asyncio.sleep(0)

        scope = {"type": kind, "method": method, "path": path, "headers": [], "app": self.app}
        await self.middleware(scope, receive, send)
        return sent

    async def ended(self) -> None:
        async with asyncio.timeout(10):
            while not self.server.should_exit:
                await self.call("http", "GET", "/health")


async def begun(vllm: VLLM) -> asyncio.Task[list[Message]]:
    """A stream that has begun, after the server's start."""
    await vllm.call("lifespan")
    stream = asyncio.create_task(vllm.call("http"))
    for _ in range(10):
        await asyncio.sleep(0)
    return stream


async def stopping(vllm: VLLM) -> None:
    """Send a signal, and return when it has arrived."""
    os.kill(os.getpid(), signal.SIGTERM)
    async with asyncio.timeout(10):
        while b"draining" not in (await vllm.call("http", "GET", "/health"))[1]["body"]:
            pass  # each call takes turns of its own


async def test_a_stream_ends_whole_before_the_server_does_and_nothing_new_begins() -> None:
    vllm = VLLM(shutdown_timeout=60)
    stream = await begun(vllm)
    await stopping(vllm)
    head, body = await vllm.call("http")
    assert head["status"] == 503
    assert (b"connection", b"close") in head["headers"]
    assert json.loads(body["body"])["error"]["code"] == "stopping"
    assert not vllm.server.should_exit
    vllm.go.set()
    assert [message.get("body") for message in await stream] == [None, FIRST, LAST]
    await vllm.ended()


async def test_a_drain_gives_a_stream_all_the_time_that_it_needs() -> None:
    vllm = VLLM(shutdown_timeout=0)
    stream = await begun(vllm)
    head, _ = await vllm.call("http", path=DRAIN_PATH)
    assert head["status"] == 202
    while (await vllm.call("http"))[0]["status"] != 503:
        vllm.go.clear()
    assert not stream.done()
    assert (await vllm.call("http", path=DRAIN_PATH))[0]["status"] == 202
    vllm.go.set()
    assert [message.get("body") for message in await stream] == [None, FIRST, LAST]
    await vllm.ended()


async def test_a_second_signal_ends_a_stream_with_an_error_and_without_done() -> None:
    vllm = VLLM(shutdown_timeout=60)
    stream = await begun(vllm)
    await stopping(vllm)
    os.kill(os.getpid(), signal.SIGINT)
    await vllm.ended()
    _, first, last = await stream
    assert first["body"] == FIRST
    assert json.loads(last["body"].removeprefix(b"data: "))["error"]["code"] == "stopping"
    assert not last["more_body"]
    assert vllm.was_cancelled


async def test_without_time_for_it_a_stream_ends_with_an_error_at_the_first_signal() -> None:
    vllm = VLLM(shutdown_timeout=0)
    stream = await begun(vllm)
    os.kill(os.getpid(), signal.SIGTERM)
    await vllm.ended()
    assert b'"code":"stopping"' in (await stream)[-1]["body"]


@pytest.mark.parametrize("path", NAMED_EVENT_PATHS)
async def test_in_a_stream_whose_events_have_names_the_error_has_one_too(path: str) -> None:
    vllm = VLLM(shutdown_timeout=0)
    end = ServerEnd()
    end.take_over(vllm.state)
    vllm.middleware = partial(end.run, vllm)
    stream = asyncio.create_task(vllm.call("http", path=path))
    await asyncio.sleep(0)
    os.kill(os.getpid(), signal.SIGTERM)
    await vllm.ended()
    assert (await stream)[-1]["body"].startswith(b'event: error\ndata: {"error":')


async def test_kv_that_an_engine_holds_is_fetched_before_the_server_ends() -> None:
    vllm = VLLM(shutdown_timeout=0)
    vllm.engines.go.clear()
    await vllm.call("lifespan")
    await vllm.call("http", path=DRAIN_PATH)
    await asyncio.wait_for(vllm.engines.is_paused.wait(), 10)
    assert not vllm.server.should_exit
    vllm.engines.go.set()
    await vllm.ended()


async def test_an_engine_is_paused_only_when_no_request_runs_any_more() -> None:
    vllm = VLLM(shutdown_timeout=60)
    stream = await begun(vllm)
    await stopping(vllm)
    assert (await vllm.call("http"))[0]["status"] == 503
    assert not vllm.engines.is_paused.is_set()
    vllm.go.set()
    await stream
    await vllm.ended()
    assert vllm.engines.is_paused.is_set()


async def test_embeddings_in_the_memory_of_an_engine_are_fetched_before_the_server_ends() -> None:
    vllm = VLLM(shutdown_timeout=60)
    vllm.engines.unfetched = [0, 2]
    await vllm.call("lifespan")
    await stopping(vllm)
    assert (await vllm.call("http"))[0]["status"] == 503
    assert not vllm.engines.is_paused.is_set()
    vllm.engines.unfetched = [0, 0]
    await vllm.ended()


async def test_a_second_signal_ends_the_wait_for_what_engines_hold() -> None:
    vllm = VLLM(shutdown_timeout=60)
    vllm.engines.go.clear()
    await vllm.call("lifespan")
    await stopping(vllm)
    await asyncio.wait_for(vllm.engines.is_paused.wait(), 10)
    os.kill(os.getpid(), signal.SIGTERM)
    await vllm.ended()


async def test_a_server_whose_engine_is_dead_ends() -> None:
    vllm = VLLM(shutdown_timeout=60)
    del vllm.engines.engine_core
    await vllm.call("lifespan")
    await stopping(vllm)
    await vllm.ended()


async def test_engines_that_other_servers_share_are_not_paused() -> None:
    vllm = VLLM(shutdown_timeout=60, api_server_count=2)
    await vllm.call("lifespan")
    await stopping(vllm)
    await vllm.ended()
    assert not vllm.engines.is_paused.is_set()


async def test_one_of_several_servers_does_not_drain_alone() -> None:
    vllm = VLLM(shutdown_timeout=0, api_server_count=2)
    stream = await begun(vllm)
    head, body = await vllm.call("http", path=DRAIN_PATH)
    assert head["status"] == 409
    assert "SIGTERM" in json.loads(body["body"])["error"]["message"]
    assert (await vllm.call("http", "GET", "/health"))[0]["status"] == 500  # vLLM's own answer, not that it drains
    vllm.go.set()
    assert (await stream)[-1]["body"] == LAST
