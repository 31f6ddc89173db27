"""Real instances behind a real proxy, on a small random checkpoint."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx2 as httpx
import pytest
import torch
from openai import OpenAI
from PIL import Image

from chiasm.bench import synthetic
from chiasm.launch import Deployment, DeploymentConfig, RoleConfig
from chiasm.launch.layout import Layout
from chiasm.wire import Role
from tests.fleet import FORKS, Signed

MODEL = "small"
SMALL = {"dtype": "float32", "kv_cache_bytes": 16 << 20, "max_model_len": 512}
ENCODED = "chiasm_images_encoded_total"
ANSWER_SECONDS = 120.0
"""More than the deadline of any request here."""
STREAMS = 20
"""So many streams are asked for, until one of them is still open when an instance is lost."""
_T = TypeVar("_T")


def pixels(seed: int, height: int = 96, width: int = 96) -> Image.Image:
    """An image of random pixels."""
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 255, (height, width, 3), generator=generator, dtype=torch.uint8).numpy())


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def data_url(data: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def sample_image(seed: int, height: int = 96, width: int = 96) -> dict[str, Any]:
    """An image of random pixels as a part of a message."""
    return part(encoded(pixels(seed, height, width)))


def part(data: bytes, mime: str = "image/png") -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(data, mime)}}


def chat(*content: str | dict[str, Any], **options: Any) -> dict[str, Any]:
    """The body of a greedy chat completion with one user message."""
    parts = [{"type": "text", "text": each} if isinstance(each, str) else each for each in content]
    body = {"model": MODEL, "messages": [{"role": "user", "content": parts}], "temperature": 0, "max_tokens": 8}
    return body | {"ignore_eos": True} | options


def various_chats() -> list[dict[str, Any]]:
    """Sixteen questions about images of several sizes, some of which occur more than once."""
    return [chat(f"number {seed}", sample_image(seed % 5, width=64 + 32 * (seed % 3)), "?") for seed in range(16)]


def second_round(first: dict[str, Any], answer: str) -> dict[str, Any]:
    """The body of a chat that goes on after this answer."""
    said_since = [{"role": "assistant", "content": answer}, {"role": "user", "content": "and what else?"}]
    return chat() | {"messages": [*first["messages"], *said_since]}


def said(message: dict[str, Any]) -> str:
    """What a message or a piece of a stream says: its text, and the calls in it, without their ids."""
    functions = [call["function"] for call in message.get("tool_calls", ())]
    calls = "".join(function.get("name", "") + function["arguments"] for function in functions)
    return (message.get("content") or "") + calls


def follows_a_schema(*content: str | dict[str, Any], **options: Any) -> dict[str, Any]:
    """The body of a chat that is answered with an object in JSON."""
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["red", "green"]}, "b": {"type": "string", "maxLength": 30}},
    }
    wanted = {"name": "answer", "schema": schema | {"required": ["a", "b"], "additionalProperties": False}}
    form = {"response_format": {"type": "json_schema", "json_schema": wanted}}
    return chat(*content, **form | {"ignore_eos": False, "max_tokens": 80} | options)


def calls_a_tool(*content: str | dict[str, Any], **options: Any) -> dict[str, Any]:
    """The body of a chat that is answered with a call."""
    parameters = {"type": "object", "properties": {"x": {"type": "string", "maxLength": 20}}, "required": ["x"]}
    tools = {"tools": [{"type": "function", "function": {"name": "look", "parameters": parameters}}]}
    required = {"tool_choice": "required", "parallel_tool_calls": False}
    return chat(*content, **tools | required | {"ignore_eos": False, "max_tokens": 120} | options)


@dataclass
class Service:
    """A deployment, and what a test asks of it."""

    deployment: Deployment
    _killed: dict[str, int] = field(default_factory=dict)
    """Process ids of instances that a test killed, by URL."""

    @property
    def url(self) -> str:
        return self.deployment.local_url

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    @property
    def signed(self) -> Signed:
        """Signs calls of instances as the proxy does."""
        return Signed(self.deployment.fleet_key)

    def post(self, body: dict[str, Any], **options: Any) -> httpx.Response:
        path = "completions" if "prompt" in body else "chat/completions"
        return httpx.post(f"{self.url}/v1/{path}", json=body, timeout=ANSWER_SECONDS, **options)

    def answer(self, body: dict[str, Any]) -> str:
        response = self.post(body)
        assert response.status_code == 200, response.text
        return said(response.json()["choices"][0]["message"])

    def metric(self, role: Role, name: str) -> float:
        """Sum of a metric over all instances of a role."""
        return sum(self.metric_at(url, name) for url in self.deployment.urls(role))

    def proxy_metric(self, name: str) -> float:
        return self.metric_at(self.url, name)

    def metric_at(self, url: str, name: str) -> float:
        """Sum of a metric of one process over all its labels."""
        return sum(
            float(line.rsplit(" ", 1)[1])
            for line in httpx.get(f"{url}/metrics", headers=self._admin, timeout=30).text.splitlines()
            if line.startswith((f"{name} ", f"{name}{{"))
        )

    def wait_until_blocks_are_free(self) -> None:
        """Of all instances that hold KV: what no request uses any more is to be free, soon."""
        for role in (Role.PREFILL, Role.DECODE):
            for url in self.deployment.urls(role):
                self.wait_until(partial(_all_blocks_free, url))

    def health(self) -> list[dict[str, Any]]:
        return list(httpx.get(f"{self.url}/health", headers=self._admin, timeout=30).json()["instances"])

    @property
    def _admin(self) -> dict[str, str]:
        """What makes the proxy take a request for its operator's."""
        key = self.deployment.config.admin_key
        return {"Authorization": f"Bearer {key}"} if key else {}

    def busy(self, role: Role) -> list[str]:
        """URLs of the instances of a role that a call is under way to."""
        return [one["url"] for one in self.health() if one["role"] == role and one["in_flight"]]

    def wait_until(self, condition: Callable[[], _T], seconds: float = 120) -> _T:
        """Return what ``condition`` returns, as soon as that is true."""
        end = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < end, "it did not happen in time"
            time.sleep(0.02)
        return found

    def wait_until_encoders_rest(self) -> None:
        """Until they have answered all calls, and counted what they did: a language instance may have answered before."""
        self.wait_until(lambda: not self.busy(Role.ENCODER))

    def encoded(self) -> float:
        """How many images the encoders have encoded, when they rest."""
        self.wait_until_encoders_rest()
        return self.metric(Role.ENCODER, ENCODED)

    def encoded_after(self, number: float) -> float:
        """How many images the encoders have encoded, as soon as it is more than ``number``: they count what is published."""
        self.wait_until(lambda: self.metric(Role.ENCODER, ENCODED) > number)
        return self.metric(Role.ENCODER, ENCODED)

    def pid(self, url: str) -> int:
        return next(process.pid for process in self.deployment.processes if process.url == url and process.pid)

    def kill(self, url: str) -> None:
        """Send SIGKILL to the instance at this URL."""
        self._killed[url] = self.pid(url)
        os.kill(self._killed[url], signal.SIGKILL)

    def wait_until_recovered(self) -> None:
        """Wait until every instance that was killed runs again, and the proxy uses all instances.

        The proxy's word alone is not enough: it calls an instance healthy until it has noticed that it is gone.
        """
        for url, killed in self._killed.items():
            self.wait_until(partial(self._runs_again, url, killed), 90)
        self._killed.clear()
        self.wait_until(lambda: all(instance["state"] == "healthy" for instance in self.health()), 90)

    def _runs_again(self, url: str, killed: int) -> bool:
        if killed in (process.pid for process in self.deployment.processes):
            return False
        try:
            return httpx.get(f"{url}/health", timeout=30).status_code == 200
        except httpx.TransportError:
            return False


def streamed(
    service: Service, body: dict[str, Any], *, at_event: int = 0, act: Callable[[], None] = lambda: None
) -> list[str]:
    """The data of a stream's events; ``act`` is called when that many have come."""
    events: list[str] = []
    with httpx.stream("POST", f"{service.url}/v1/chat/completions", json=body, timeout=ANSWER_SECONDS) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("data: "):
                events.append(line.removeprefix("data: "))
                if len(events) == at_event:
                    act()
    return events


def texts_of(events: list[str]) -> dict[int, str]:
    """What each choice of a stream that ended well says."""
    *data, done = events
    assert done == "[DONE]", events[-1]
    texts: dict[int, str] = {}
    for choice in (choice for event in data for choice in json.loads(event)["choices"]):
        texts[choice["index"]] = texts.get(choice["index"], "") + said(choice["delta"])
    return texts


def struck(service: Service, aggregated: Service, body: dict[str, Any], attempt: Callable[[], list[str]]) -> list[str]:
    """The events of a stream that an instance was lost to while it was open.

    ``attempt`` asks for the stream, and has an instance lost in the middle of it. Whoever reads a stream may lag behind it, so
    that the instance has sent all of it before; then the stream is whole, and is asked for again.
    """
    for _ in range(STREAMS):
        before = service.proxy_metric("chiasm_proxy_resumed_streams_total")
        events = attempt()
        if events[-1] != "[DONE]" or service.proxy_metric("chiasm_proxy_resumed_streams_total") > before:
            return events
        assert texts_of(events) == texts_of(streamed(aggregated, body))
        service.wait_until_recovered()
    raise AssertionError(f"each of {STREAMS} streams had been sent before anything could happen to it")


def _all_blocks_free(url: str) -> bool:
    health = httpx.get(f"{url}/health", timeout=30).json()
    return bool(health["kv_blocks_free"] == health["kv_blocks_total"])


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.make("qwen3_vl", tmp_path_factory.mktemp("integration") / MODEL)


def run(
    checkpoint: Path,
    roles: Mapping[Role, int | RoleConfig],
    *,
    layout: Layout = Layout.AUTO,
    fields: Mapping[str, Any] | None = None,
    **proxy_settings: Any,
) -> Iterator[Service]:
    """Start a deployment; ``fields`` are more fields of its configuration."""
    config = DeploymentConfig(
        model=str(checkpoint),
        roles={
            role: RoleConfig(count=given, threads=1) if isinstance(given, int) else given
            for role, given in roles.items()
        },
        layout=layout,
        served_model_name=MODEL,
        proxy_settings=proxy_settings,
        **{"settings": SMALL} | dict(fields or {}),
    )
    with Deployment(config, forks=FORKS) as deployment:
        deployment.wait_ready(180)
        yield Service(deployment)


@pytest.fixture(scope="session")
def aggregated(checkpoint: Path) -> Iterator[Service]:
    yield from run(checkpoint, {Role.AGGREGATED: 1})


@pytest.fixture(scope="session")
def disaggregated(checkpoint: Path) -> Iterator[Service]:
    """Two encoders and two PDs. No call is hedged, so that each image is encoded once, however late an encoder is."""
    yield from run(checkpoint, {Role.ENCODER: 2, Role.PD: 2}, hedged_share=0.0)


@pytest.fixture(scope="module")
def epd(checkpoint: Path) -> Iterator[Service]:
    """One encoder, one prefill and one decode instance."""
    yield from run(checkpoint, {Role.ENCODER: 1, Role.PREFILL: 1, Role.DECODE: 1})


@pytest.fixture(scope="module")
def epd_pairs(checkpoint: Path) -> Iterator[Service]:
    """One encoder, two prefill and two decode instances, to be killed.

    Where both of a role stand still for some time, a request waits for one, but not for long: one test has neither come back.
    """
    yield from run(
        checkpoint, {Role.ENCODER: 1, Role.PREFILL: 2, Role.DECODE: 2}, deadline_seconds=60, wait_for_instance_seconds=5
    )


@pytest.fixture
def fragile(checkpoint: Path) -> Iterator[Service]:
    """Two encoders and one PD, to be killed."""
    yield from run(checkpoint, {Role.ENCODER: 2, Role.PD: 1}, deadline_seconds=90, wait_for_instance_seconds=60)


def kill_the_busy(service: Service, role: Role) -> None:
    """Kill the instance that the one call goes to, if it still does. All stand still, so that it can't end meanwhile."""
    with stopped(service, role):
        for url in service.busy(role):
            service.kill(url)


@contextmanager
def stopped(service: Service, role: Role) -> Iterator[dict[str, int]]:
    """The instances of a role stand still meanwhile; gives their process ids by URL."""
    pids = {url: service.pid(url) for url in service.deployment.urls(role)}
    for pid in pids.values():
        os.kill(pid, signal.SIGSTOP)
    try:
        yield pids
    finally:
        for pid in pids.values():
            try:
                os.kill(pid, signal.SIGCONT)
            except ProcessLookupError:
                continue
