"""A proxy that listens on one address of the machine which isn't loopback: to it, who asks from the machine is a stranger."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import httpx2 as httpx
import psutil
import pytest

from chiasm.wire import Role

from .conftest import Service, chat, run

ADDRESSES = [
    one.address
    for several in psutil.net_if_addrs().values()
    for one in several
    if one.family == socket.AF_INET and not ip_address(one.address).is_loopback
]


@pytest.fixture
def service(checkpoint: Path) -> Iterator[Service]:
    yield from run(checkpoint, {Role.AGGREGATED: 1}, fields={"host": ADDRESSES[0]})


@pytest.mark.skipif(not ADDRESSES, reason="this machine has no address but loopback")
def test_its_supervisor_sees_the_instances_and_a_stranger_does_not(service: Service) -> None:
    assert service.answer(chat("hello"))
    assert service.deployment.is_ready()
    assert "instances" not in httpx.get(f"{service.url}/health", timeout=60).json()
