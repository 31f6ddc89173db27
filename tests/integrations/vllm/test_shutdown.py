"""How vLLM's server ends under chiasm's middleware."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from types import SimpleNamespace

from starlette.types import Message, Receive, Scope, Send

from chiasm.integrations.vllm.middleware import ChiasmMiddleware
from chiasm.wire import COMPLETIONS_PATH, DRAIN_PATH

FIRST, LAST = b"data: one\n\n", b"data: [DONE]\n\n"


class VLLM:
    """vLLM's server, with an application that streams until it is let go."""

    def __init__(self, shutdown_timeout: int) -> None:
        self.server = SimpleNamespace(should_exit=False)
        config = SimpleNamespace(shutdown_timeout=shutdown_timeout)
        self.app = SimpleNamespace(state=SimpleNamespace(vllm_config=config, server=self.server))
        self.go = asyncio.Event()
        self.was_cancelled = False
        self.middleware = ChiasmMiddleware(self)

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
