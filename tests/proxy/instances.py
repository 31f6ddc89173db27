"""Small real servers that play encoders, PDs and aggregated instances: they speak the wire and note what they get."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from aiohttp import web

FINGERPRINT = "f" * 64
MODEL = "tiny"


@dataclass
class Received:
    """One request as it came."""

    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def parts(self) -> list[dict[str, Any]]:
        """All content parts of all messages."""
        messages = self.json["messages"]
        return [part for message in messages if isinstance(message["content"], list) for part in message["content"]]

    @property
    def identifiers(self) -> list[str]:
        return [part["uuid"] for part in self.parts if "uuid" in part]


class FakeInstance:
    """An instance on a port of its own. Replace ``answer`` to have it behave otherwise."""

    def __init__(self, role: str, /, **health: Any) -> None:
        self.role = role
        self.health: dict[str, Any] | None = {
            "status": "ok",
            "role": role,
            "model": MODEL,
            "fingerprint": FINGERPRINT,
            "ec_store": "store",
            "version": "1",
            "max_model_len": 4096,
            "max_items": 8,
        } | health
        """None answers like vLLM: an empty 200, and the model's name elsewhere."""
        self.health_status = 200
        self.awake = asyncio.Event()
        """As long as it isn't set, /health doesn't answer."""
        self.awake.set()
        self.received: list[Received] = []
        self.arrived = asyncio.Semaphore(0)
        self.gone = asyncio.Semaphore(0)
        """Released for each call that the proxy ended before it had its answer."""
        self.answer: Callable[[FakeInstance, web.Request, Received], Awaitable[web.StreamResponse]] = (
            encode if role == "encoder" else chat
        )
        self._runner: web.AppRunner | None = None
        self._port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    async def start(self) -> FakeInstance:
        application = web.Application(client_max_size=1 << 30)
        application.router.add_get("/health", self._health)
        application.router.add_get("/v1/models", self._models)
        application.router.add_post("/v1/{route:.*}", self._take)
        self._runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=0, access_log=None)
        await self._runner.setup()
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self._port))
        self._port = listener.getsockname()[1]
        await web.SockSite(self._runner, listener).start()
        return self

    async def kill(self) -> None:
        """As SIGKILL does: nobody listens, and all connections are reset."""
        runner, self._runner = self._runner, None
        if runner is None:
            return
        for site in list(runner.sites):
            await site.stop()
        assert runner.server is not None
        for connection in runner.server.connections:
            if connection.transport is not None:
                connection.transport.abort()
        await runner.cleanup()

    async def _health(self, request: web.Request) -> web.Response:
        await self.awake.wait()
        if self.health is None:
            return web.Response(status=self.health_status)
        return web.json_response(self.health, status=self.health_status)

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": MODEL, "object": "model", "max_model_len": 2048}]})

    async def _take(self, request: web.Request) -> web.StreamResponse:
        received = Received(request.path, request.headers, await request.read())
        self.received.append(received)
        self.arrived.release()
        try:
            return await self.answer(self, request, received)
        except (asyncio.CancelledError, ConnectionError):
            self.gone.release()
            raise


async def encode(instance: FakeInstance, request: web.Request, received: Received) -> web.Response:
    """What an encoder answers: every item is where it should be."""
    entries: dict[str, Any] = {}
    for index, name in enumerate(received.identifiers):
        entry = entries.setdefault(name, {"item_indices": [], "metadata": {"image_grid_thw": [1, 4, 6]}})
        entry["item_indices"].append(index)
    return web.json_response(
        {"object": "chat.completion", "choices": [], "ec_transfer_params": entries},
        headers={"Server-Timing": "encode;dur=12.5"},
    )


async def chat(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
    """What a PD answers: two tokens, as a stream where one is asked for."""
    timing = {"Server-Timing": 'queue;dur=1.5, item0;desc="hit"'}
    head = {"id": "c", "object": "chat.completion", "created": 1, "model": MODEL}
    if not received.json.get("stream"):
        message = {"role": "assistant", "content": "a cat"}
        answer = head | {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
        return web.json_response(answer, headers=timing)
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"} | timing)
    await response.prepare(request)
    for word in ("a ", "cat"):
        await response.write(event(word))
    await response.write(b": server-timing prefill;dur=3\n\ndata: [DONE]\n\n")
    return response


def event(word: str) -> bytes:
    choice = {"index": 0, "delta": {"content": word}, "finish_reason": None}
    head = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": MODEL}
    return b"data: " + json.dumps(head | {"choices": [choice]}).encode() + b"\n\n"


async def never(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
    """No answer, until the proxy ends the call."""
    await asyncio.Event().wait()
    raise AssertionError


def refuse(status: int, message: str, **headers: str) -> Callable[..., Awaitable[web.StreamResponse]]:
    """An error answer in the shape of the OpenAI API."""

    async def answer(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        return web.json_response({"error": error}, status=status, headers=headers)

    return answer
