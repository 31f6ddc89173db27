"""What an instance does only for processes of its fleet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from chiasm.engine import EngineConfig
from chiasm.errors import ConfigurationError
from chiasm.fleet_key import FleetKey, make_fleet_key
from chiasm.http import Exchange
from chiasm.http.connections import CONNECTION
from chiasm.http.fleet_calls import FleetGuard, body_digest, signature
from chiasm.server import ServerConfig, run
from chiasm.server.context import ServerContext
from chiasm.wire import CLIENT_HEADER, Role


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "a.example"])
def test_without_a_key_it_is_reached_from_its_own_machine_alone(host: str) -> None:
    with pytest.raises(ConfigurationError, match=r"listens on loopback alone.*--fleet-key-file"):
        run(EngineConfig(Path("/nowhere"), Role.AGGREGATED), ServerConfig(host=host, port=0))


@pytest.fixture
def key() -> FleetKey:
    return FleetKey([make_fleet_key()])


async def client_of(guard_key: FleetKey | None, *, signed_with: FleetKey | None = None, peer: str = "127.0.0.1") -> str:
    """Return whose request it is, in the eyes of an instance, if it says that it is ``somebody``'s."""
    context = ServerContext("m", ServerConfig())
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(context.key_of(Exchange(scope, receive, send, context.admission, deadline_seconds=1)))

    async def unused(*_: object) -> Any:
        pytest.fail("nothing is received or sent")

    headers = {CLIENT_HEADER: "somebody"}
    if signed_with is not None:
        headers |= signature(signed_with, "POST", "/", body_digest(b""), client="somebody")
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "path": "/", "headers": raw, "client": (peer, 1), CONNECTION: None}
    await FleetGuard(app, guard_key)(scope, unused, unused)
    return seen[0]


async def test_the_fleet_says_for_whom_it_calls(key: FleetKey) -> None:
    assert await client_of(key, signed_with=key, peer="192.0.2.1") == "somebody"
    assert await client_of(None) == "somebody"


async def test_a_stranger_does_not(key: FleetKey) -> None:
    assert await client_of(key) == ""
    assert await client_of(None, peer="192.0.2.1") == ""
