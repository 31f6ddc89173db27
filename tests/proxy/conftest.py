"""Fleets of fake instances, with a real proxy in front of them on a real socket."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import openai
import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver
from PIL import Image

from chiasm.http.listen import bind, url_of
from chiasm.media import MediaConfig
from chiasm.proxy import ProxyConfig, job, service
from chiasm.proxy.app import create_app
from chiasm.proxy.process import create_server
from chiasm.proxy.service import ProxyService

from .instances import MODEL, Answering, FakeInstance, Received

LOOPBACK = ("127.0.0.0/8",)


@dataclass
class Front:
    """A running proxy, the instances behind it, and ways to talk to it."""

    url: str
    service: ProxyService
    session: aiohttp.ClientSession
    instances: list[FakeInstance] = field(default_factory=list)
    stop: Callable[[], Awaitable[None]] = field(default=lambda: asyncio.sleep(0))
    """Ends the proxy as a signal does, and waits for its end."""

    @property
    def openai(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    async def post(self, body: Any, path: str = "/v1/chat/completions", **headers: str) -> Answer:
        data = body if isinstance(body, bytes) else None
        async with self.session.post(
            self.url + path, data=data, json=None if data is not None else body, headers=headers
        ) as response:
            return Answer(response.status, response.headers, await response.read())

    async def get(self, path: str, **headers: str) -> Answer:
        async with self.session.get(self.url + path, headers=headers) as response:
            return Answer(response.status, response.headers, await response.read())

    @property
    def admin(self) -> dict[str, str]:
        """The headers of the operator."""
        key = self.service.config.admin_key
        return {} if key is None else {"Authorization": f"Bearer {key}"}

    async def states(self) -> dict[str, str]:
        """InstanceState by URL, as /health has it."""
        health = (await self.get("/health", **self.admin)).json
        return {instance["url"]: instance["state"] for instance in health["instances"]}

    async def until(self, instance: FakeInstance, state: str) -> None:
        """Return when the proxy sees the instance in this state."""
        async with asyncio.timeout(60):
            while (await self.states()).get(instance.url, "removed") != state:
                pass  # each look takes a turn of its own

    async def record(self, request_id: str) -> Any:
        """What ``/requests/ID`` says, when there is a record: shortly after the client has the answer."""
        async with asyncio.timeout(60):
            while (answer := await self.get(f"/requests/{request_id}", **self.admin)).status == 404:
                pass  # each look takes a turn of its own
        return answer.json

    async def metric(self, name: str) -> float:
        """The value of one sample, named with its labels as the page has it; 0 if it isn't there."""
        for line in (await self.get("/metrics", **self.admin)).body.decode().splitlines():
            if line.startswith(name + " "):
                return float(line.rpartition(" ")[2])
        return 0.0


@dataclass
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error


Start = Callable[..., Awaitable[Front]]
PATIENCE_SECONDS = 20.0


@pytest.fixture
async def start(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Start]:
    """``await start([encoder, pd], …)`` runs a proxy in front of these instances until the end of the test.

    It has probed all of them when it starts, however busy the machine is.
    """
    monkeypatch.setattr(service, "_FIRST_PROBE_SECONDS", PATIENCE_SECONDS)
    async with AsyncExitStack() as stack:

        async def start_one(
            instances: list[FakeInstance], *, resolver: AbstractResolver | None = None, **config: Any
        ) -> Front:
            for instance in instances:
                await instance.start()
                stack.push_async_callback(instance.kill)
            urls: dict[str, tuple[str, ...]] = {
                name: tuple(one.url for one in instances if one.role == role)
                for name, role in (
                    ("encoders", "encoder"),
                    ("pds", "pd"),
                    ("aggregated", "aggregated"),
                    ("prefills", "prefill"),
                    ("decodes", "decode"),
                )
            }
            defaults: dict[str, Any] = {
                "port": 0,
                "media": MediaConfig(allowed_media_networks=LOOPBACK),
                "probe_interval_seconds": 0.05,
                "deadline_seconds": 60.0,
                # All of them, and the client, share one event loop, which is busy for seconds on a busy machine.
                "connect_timeout_seconds": PATIENCE_SECONDS,
                "probe_timeout_seconds": PATIENCE_SECONDS,
                "busy_probe_timeout_seconds": PATIENCE_SECONDS,
                "shutdown_timeout_seconds": 2.0,
                "wait_for_instance_seconds": 0.0,
            }
            settings = ProxyConfig(**(defaults | urls | config))
            app = create_app(settings, resolver=resolver)
            server = create_server(app, settings)
            listener = bind("127.0.0.1", settings.port)
            serving = asyncio.ensure_future(server.serve(sockets=[listener]))
            url = url_of(listener)

            async def stop() -> None:
                server.stop()
                await serving

            stack.push_async_callback(stop)
            await server.ready.wait()
            session = await stack.enter_async_context(aiohttp.ClientSession())
            return Front(url, app.state.service, session, instances, stop)

        yield start_one


GIVES_UP_SECONDS = 4.0
"""The deadline of requests that give up two seconds before, see ``giving_up_early``."""


@pytest.fixture
def giving_up_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that wait for room give up so long before their deadline that no pause of the machine reaches it."""
    monkeypatch.setattr(job, "_BEFORE_DEADLINE_SECONDS", GIVES_UP_SECONDS / 2)


def image_bytes(colour: str = "red", size: tuple[int, int] = (6, 4), format: str = "PNG", **options: Any) -> bytes:
    """Return an image file of one colour; ``size`` is width and height."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, format, **options)
    return file.getvalue()


def data_url(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def image(url: str | bytes, **more: Any) -> dict[str, Any]:
    """Return an image part with a URL, or with an image's bytes."""
    return {"type": "image_url", "image_url": {"url": data_url(url) if isinstance(url, bytes) else url}} | more


def ask(*parts: dict[str, Any] | str, **more: Any) -> dict[str, Any]:
    """Return the body of a chat completion with one user message."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"model": MODEL, "messages": [{"role": "user", "content": content}]} | more


@dataclass
class Heard:
    """What a client received of a stream."""

    raw: bytes = b""
    words: list[str] = field(default_factory=list)
    error: dict[str, Any] | None = None
    """The error event that ended the stream, if one did."""
    ended: bool = False
    """Whether ``[DONE]`` came."""

    @property
    def text(self) -> str:
        return "".join(self.words)


async def listen(front: Front, body: Any, at: Mapping[int, asyncio.Event] | None = None) -> Heard:
    """Read a stream event by event; set ``at[n]`` when n words have arrived."""
    heard = Heard()
    async with front.session.post(f"{front.url}/v1/chat/completions", json=body) as response:
        assert response.status == 200, await response.read()
        while block := await _block(response.content):
            heard.raw += block
            for line in block.splitlines():
                if line == b"data: [DONE]":
                    heard.ended = True
                elif line.startswith(b"data: "):
                    data = json.loads(line.removeprefix(b"data: "))
                    heard.error = data.get("error", heard.error)
                    heard.words += [word for one in data.get("choices", ()) if (word := one["delta"]["content"])]
            if wanted := (at or {}).get(len(heard.words)):
                wanted.set()
    return heard


async def _block(content: aiohttp.StreamReader) -> bytes:
    try:
        return await content.readuntil(b"\n\n")
    except asyncio.IncompleteReadError as end:
        return end.partial


async def until_idle(front: Front) -> None:
    """Return when the proxy holds, counts and does nothing."""
    service = front.service
    encoders = service.router.encoders
    async with asyncio.timeout(60):
        while (
            encoders._flights
            or encoders._tasks
            or service.admission.requests
            or service.admission.held_bytes
            or any(one.in_flight or one.outstanding for one in service.fleet.instances)
        ):
            await front.get("/health")


def when_encoded(front: Front, answer: Answering, count: int = 1) -> Answering:
    """Answer when the proxy has heard that images are encoded: a prompt that is computed before has needed no embedding."""

    async def wait(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        while await front.metric('chiasm_proxy_items_total{outcome="encoded"}') < count:
            pass
        return await answer(instance, request, received)

    return wait


async def leave(front: Front, body: dict[str, Any], *arrivals: FakeInstance) -> None:
    """Send a request on a socket of its own, and close it when these instances have been called."""
    host, port = front.url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    _, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    for instance in arrivals:
        await asyncio.wait_for(instance.arrived.acquire(), 60)
    writer.close()


class Images:
    """A web server with one image; ``await images(bytes)`` gives its URL."""

    def __init__(self) -> None:
        self.content = b""
        self.fetched = 0
        self.runner: web.AppRunner | None = None

    async def __call__(self, content: bytes) -> str:
        self.content = content
        if self.runner is None:
            application = web.Application()
            application.router.add_get("/image", self._image)
            self.runner = web.AppRunner(application, access_log=None)
            await self.runner.setup()
            await web.TCPSite(self.runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{self.runner.addresses[0][1]}/image"

    async def _image(self, request: web.Request) -> web.Response:
        self.fetched += 1
        return web.Response(body=self.content)


@pytest.fixture
async def images() -> AsyncIterator[Images]:
    images = Images()
    yield images
    if images.runner is not None:
        await images.runner.cleanup()
