"""What the proxy sends to instances is signed with the fleet key, by the clock of each of them."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from chiasm.errors import Code
from chiasm.fleet_key import FleetKey, make_fleet_key
from chiasm.http.fleet_calls import FleetGuard, body_digest, caller_of
from chiasm.wire import FLEET_HEADER

from .conftest import Start, ask, data_url, image, image_bytes, when_encoded
from .instances import FakeInstance, chat, once, refuse

CLOCK = 1_000_000_000_000
"""An instance's, in milliseconds: years behind."""
DRIFT_SECONDS = 50


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> FleetKey:
    made = FleetKey([make_fleet_key()])
    for name, value in made.environment().items():
        monkeypatch.setenv(name, value)
    return made


async def test_calls_are_signed_by_the_clock_of_the_instance(start: Start, key: FleetKey) -> None:
    known = {"fleet_keys": list(key.names), "clock_milliseconds": CLOCK}
    encoder, pd = FakeInstance("encoder", **known), FakeInstance("pd", **known)
    front = await start([encoder, pd], max_encode_attempts=1)
    assert (await front.post(ask("x", image(data_url(image_bytes()))))).status == 200
    for instance in (encoder, pd):
        (received,) = instance.received
        guard = FleetGuard(_unused, key, clock=lambda: CLOCK / 1000 + DRIFT_SECONDS)
        raw = [(name.lower().encode(), value.encode()) for name, value in received.headers.items()]
        scope, _ = guard._checked(
            {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": raw}, _unused
        )
        assert caller_of(scope).is_of_fleet
        assert body_digest(received.body).hex() in received.headers[FLEET_HEADER]


@pytest.mark.parametrize("role", ["encoder", "pd"])
async def test_an_instance_whose_clock_was_set_is_asked_again(start: Start, key: FleetKey, role: str) -> None:
    known = {"fleet_keys": list(key.names), "clock_milliseconds": CLOCK}
    encoder, pd = FakeInstance("encoder", **known), FakeInstance("pd", **known)
    front = await start([encoder, pd], probe_interval_seconds=1000.0)
    pd.answer = when_encoded(front, chat)
    asked = encoder if role == "encoder" else pd
    assert asked.health is not None
    asked.health = replace(asked.health, clock_milliseconds=CLOCK + 3_600_000)
    once(refuse(403, "It is 3600 seconds old.", code=Code.FLEET_SIGNATURE_INVALID), asked.answer, asked)
    assert (await front.post(ask("x", image(data_url(image_bytes()))))).status == 200
    first, second = (int(one.headers[FLEET_HEADER].split()[1]) for one in asked.received)
    assert first < CLOCK + 3_600_000 <= second


async def test_without_a_key_nothing_is_signed(start: Start) -> None:
    pd = FakeInstance("pd")
    front = await start([pd])
    assert (await front.post(ask("x"))).status == 200
    assert FLEET_HEADER not in pd.received[0].headers


@pytest.mark.parametrize("has_key", [True, False])
async def test_an_instance_with_another_key_is_not_used(
    start: Start, request: pytest.FixtureRequest, has_key: bool
) -> None:
    if has_key:
        request.getfixturevalue("key")
    pd = FakeInstance("pd", fleet_keys=["another"])
    front = await start([pd], wait_for_instance_seconds=0)
    assert (await front.post(ask("x"))).status == 503
    (shown,) = (await front.get("/health")).json["instances"]
    assert shown["state"] != "healthy"
    assert "--fleet-key-file" in shown["reason"]
    assert not pd.received


async def _unused(*_: object) -> Any:
    pytest.fail("nothing is received or sent")
