"""Encoders and language models on different hosts, without a shared folder, answer as one process does, token for token."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from chiasm.fleet_key import make_fleet_key
from tests.cli.running import Running
from tests.hosts import Host, Network
from tests.integration.conftest import ANSWER_SECONDS, MODEL, Service, chat, said, sample_image
from tests.launch.waiting import eventually

A, B = sample_image(1), sample_image(2, height=64, width=160)
QUESTIONS = (
    chat("hello there"),
    chat("what is", A, "this?"),
    chat(B, "and", A, "?"),
    chat("look at", A, "again"),
)
START_SECONDS = 240
TCP = ("--connector", "TcpConnector")
NIXL = ("--connector", "NixlConnector")
INSTANCE = ("--threads", "1", "--kv-cache-bytes", "16MiB", "--max-model-len", "512", "--served-model-name", MODEL)


class Fleet:
    """Instances and a proxy, started as anybody would on each host; leaving the context kills them."""

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        self._checkpoint = checkpoint
        self._folder = folder
        self._key = folder / "fleet.key"
        self._key.write_text(make_fleet_key())
        self._key.chmod(0o600)
        self._instances: list[tuple[str, Running]] = []
        self._stack = ExitStack()
        self._client: Host | None = None
        self._url = ""

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def instance(self, host: Host, role: str, *arguments: str) -> None:
        """Start an instance on a host."""
        where = ("--host", host.address, "--port", "0")
        started = self._start(host, "instance", str(self._checkpoint), "--role", role, *where, *INSTANCE, *arguments)
        self._instances.append((role, started))

    def proxy(self, host: Host) -> None:
        """Start the proxy in front of all instances, as soon as they are ready, and wait for it."""
        urls = [(f"--{role}", instance.wait_ready(START_SECONDS)) for role, instance in self._instances]
        proxy = self._start(host, "proxy", "--port", "0", *(word for pair in urls for word in pair))
        self._url, self._client = proxy.wait_ready(START_SECONDS), host

    def answer(self, body: dict[str, Any]) -> str:
        """Ask the proxy, on its host."""
        assert self._client is not None
        with self._client.inside():
            response = httpx.post(f"{self._url}/v1/chat/completions", json=body, timeout=ANSWER_SECONDS)
        assert response.status_code == 200, response.text
        return said(response.json()["choices"][0]["message"])

    def states(self) -> dict[str, str]:
        """What the proxy thinks of each instance, by role."""
        assert self._client is not None
        with self._client.inside():
            health = httpx.get(f"{self._url}/health", timeout=60).json()
        return {instance["role"]: instance["state"] for instance in health["instances"]}

    def _start(self, host: Host, *arguments: str) -> Running:
        folder = self._folder / str(len(list(self._folder.iterdir())))
        folder.mkdir()
        with host.inside():
            return self._stack.enter_context(Running(folder, *arguments, "--fleet-key-file", str(self._key)))


@pytest.fixture
def fleet(checkpoint: Path, tmp_path: Path) -> Iterator[Fleet]:
    with Fleet(checkpoint, tmp_path) as fleet:
        yield fleet


def encoder_apart(fleet: Fleet, connector: tuple[str, ...], a: Host, b: Host) -> None:
    """Start an encoder on one host, a PD and the proxy on another."""
    fleet.instance(a, "encoder", *connector, "--ec-host", a.address)
    fleet.instance(b, "pd", *connector)
    fleet.proxy(b)


def test_an_encoder_on_another_host_whose_link_fails_and_comes_back(fleet: Fleet, aggregated: Service) -> None:
    with Network(2) as (a, b), ThreadPoolExecutor(1) as pool:
        encoder_apart(fleet, TCP, a, b)
        for question in QUESTIONS:
            assert fleet.answer(question) == aggregated.answer(question)
        question = chat("what is", sample_image(3), "this?")
        a.unplug()
        answer = pool.submit(fleet.answer, question)
        assert eventually(lambda: fleet.states() == {"pd": "healthy", "encoder": "unhealthy"})
        a.plug()
        assert answer.result() == aggregated.answer(question)


def test_an_encoder_on_another_host_with_nixl(
    fleet: Fleet, aggregated: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")  # there is no other way from host to host
    with Network(2) as (a, b):
        encoder_apart(fleet, NIXL, a, b)
        for question in QUESTIONS:
            assert fleet.answer(question) == aggregated.answer(question)


def test_encoder_prefill_and_decode_on_three_hosts(fleet: Fleet, aggregated: Service) -> None:
    kv = ("--kv-connector", "TcpConnector")
    with Network(3) as (a, b, c):
        fleet.instance(a, "encoder", *TCP, "--ec-host", a.address)
        fleet.instance(b, "prefill", *TCP, *kv, "--kv-host", b.address)
        fleet.instance(c, "decode", *kv)
        fleet.proxy(c)
        for question in QUESTIONS:
            assert fleet.answer(question) == aggregated.answer(question)
