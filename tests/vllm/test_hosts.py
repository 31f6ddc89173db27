"""Instances of vLLM on different hosts, without a shared folder, answer as one instance does, token for token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from chiasm.fleet_key import FLEET_KEY_VARIABLE, make_fleet_key
from tests.hosts import Host, Network

from .conftest import Launch
from .fleet import WAIT_SECONDS, ask_all, bodies, front, prefill_and_decode
from .processes import Server, transfer_config, vllm


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    with Network(3) as hosts:
        yield hosts


@pytest.fixture(autouse=True)
def environment(aggregated: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is exported on every machine. Instances that other tests use are started before, and have no fleet key."""
    monkeypatch.setenv(FLEET_KEY_VARIABLE, make_fleet_key())
    monkeypatch.setenv("UCX_TLS", "tcp")  # there is no other way from host to host


def encoder_on(host: Host, logs: Path, connector: str) -> Server:
    transfer = transfer_config("ec_producer", connector, host=host.address)
    with host.inside():
        return vllm(logs, f"there-{connector}", transfer, address=host.address)


def check(host: Host, proxy: Server, aggregated: Server, first_seed: int) -> None:
    """Ask the proxy on its host what the aggregated instance is asked here."""
    some = bodies(first_seed)
    with host.inside():
        proxy.wait_ready()
        answers = ask_all(proxy, some)
    assert answers == ask_all(aggregated, some)


def test_encoder_and_pd_on_two_hosts_with_nixl(
    hosts: list[Host], launch: Launch, logs: Path, aggregated: Server
) -> None:
    there, here, _ = hosts
    encoder = launch(encoder_on(there, logs, "NixlConnector"))
    with here.inside():
        transfer = transfer_config("ec_consumer", "NixlConnector", wait_seconds=WAIT_SECONDS)
        pd = launch(vllm(logs, "here-pd", transfer, address=here.address))
        for server in (encoder, pd):
            server.wait_ready()
        proxy = launch(front(logs, "here-two", encoder=[encoder], pd=[pd]))
    check(here, proxy, aggregated, 31_000)
    with there.inside():
        assert encoder.count("saves") > 0


def test_encoder_prefill_and_decode_on_three_hosts(
    hosts: list[Host], launch: Launch, logs: Path, aggregated: Server
) -> None:
    a, b, c = hosts
    encoder = launch(encoder_on(a, logs, "TcpConnector"))
    prefill, decode = map(launch, prefill_and_decode(logs, "apart", "TcpConnector", hosts=(b, c)))
    with c.inside():
        for server in (encoder, prefill, decode):
            server.wait_ready()
        proxy = launch(front(logs, "here-three", encoder=[encoder], prefill=[prefill], decode=[decode]))
    check(c, proxy, aggregated, 32_000)
    with b.inside():
        assert prefill.count("loads") > 0
    with c.inside():
        assert decode.metric("vllm:nixl_bytes_transferred_sum") > 0
        assert decode.metric("vllm:nixl_num_failed_transfers_total") == 0
