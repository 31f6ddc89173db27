"""Calls that only processes of a fleet may make: what a signature proves, and for how long."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import pytest
from starlette.types import Message, Receive, Scope, Send

from chiasm.errors import ChiasmError, Code, ForbiddenError
from chiasm.fleet_key import FleetKey, make_fleet_key
from chiasm.http.fleet_calls import (
    MAX_REMEMBERED,
    VALID_SECONDS,
    FleetGuard,
    OtherClock,
    body_digest,
    caller_of,
    check_fleet,
    signature,
)
from chiasm.wire import CLIENT_HEADER, ErrorBody

NOW = 1_800_000_000
KEY = FleetKey([make_fleet_key()])
BODY = b'{"model": "m"}'


class Instance:
    """A server behind the guard that tells who calls."""

    def __init__(self, key: FleetKey | None = KEY) -> None:
        self.now: float = NOW
        self.guard = FleetGuard(self._answer, key, clock=lambda: self.now)
        self.is_of_fleet: bool | None = None

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body", False):
            pass
        self.is_of_fleet = caller_of(scope).is_of_fleet

    async def call(
        self, headers: dict[str, str], *, body: bytes = BODY, path: str = "/p", peer: str = "192.0.2.1"
    ) -> str | None:
        """Return the code of the refusal; None if the call reached the application."""
        self.is_of_fleet = None
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "method": "POST", "path": path, "headers": raw, "client": (peer, 1)}
        pieces = [body[:4], body[4:]]
        sent: list[Message] = []

        async def receive() -> Message:
            piece = pieces.pop(0)
            return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

        async def send(message: Message) -> None:
            sent.append(message)

        try:
            await self.guard(scope, receive, send)
        except ChiasmError as error:  # while the body is read
            return error.code
        return str(msgspec.json.decode(sent[1]["body"], type=ErrorBody).error.code) if sent else None


def signed(
    key: FleetKey = KEY, *, path: str = "/p", body: bytes = BODY, at: float = NOW, client: str = ""
) -> dict[str, str]:
    headers = signature(key, "POST", path, body_digest(body), clock_milliseconds=int(at * 1000), client=client)
    return {**headers, CLIENT_HEADER: client} if client else headers


async def test_a_signed_call_is_one_of_the_fleet() -> None:
    instance = Instance()
    assert await instance.call(signed(client="a key's name")) is None
    assert instance.is_of_fleet


@pytest.mark.skipif(not hasattr(time, "CLOCK_BOOTTIME"), reason="only Linux has a clock that stands still in suspend")
async def test_a_call_after_the_machine_was_suspended_has_the_time_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    instance, clock, read = Instance(), OtherClock(), time.clock_gettime
    clock.set(NOW * 1000)
    monkeypatch.setattr(time, "clock_gettime", lambda which: read(which) + 600 * (which == time.CLOCK_BOOTTIME))
    instance.now = NOW + 600
    headers = signature(KEY, "POST", "/p", body_digest(BODY), clock_milliseconds=clock.milliseconds)
    assert await instance.call(headers) is None


async def test_a_call_without_signature_passes_as_a_strangers() -> None:
    instance = Instance()
    assert await instance.call({}, peer="127.0.0.1") is None
    assert instance.is_of_fleet is False


@pytest.mark.parametrize(
    ("headers", "sent"),
    [
        (signed(FleetKey([make_fleet_key()])), {}),
        (signed(path="/q"), {}),
        (signed(), {"body": BODY.replace(b"m", b"n")}),
        (signed(), {"body": BODY + b" "}),
        (signed(client="somebody"), {"client": "somebody else"}),
        (signed(at=NOW - VALID_SECONDS - 1), {}),
        (signed(at=NOW + VALID_SECONDS + 1), {}),
        ({"x-chiasm-fleet": "1 2 3"}, {}),
        ({"x-chiasm-fleet": ""}, {}),
    ],
    ids=["another key", "path", "body", "longer body", "client", "too old", "from the future", "malformed", "empty"],
)
async def test_a_signature_for_something_else_is_refused(headers: dict[str, str], sent: dict[str, Any]) -> None:
    if client := sent.pop("client", ""):
        headers = {**headers, CLIENT_HEADER: client}
    assert await Instance().call(headers, **sent) == Code.FLEET_SIGNATURE_INVALID


@pytest.mark.parametrize("passed", [0, VALID_SECONDS, 2 * VALID_SECONDS - 1])
async def test_a_signature_counts_once_as_long_as_it_is_valid(passed: float) -> None:
    """A clock may be behind that of the proxy, so a signature may be from the future."""
    instance = Instance()
    headers = signed(at=NOW + VALID_SECONDS)
    assert await instance.call(headers) is None
    instance.now += passed
    assert await instance.call(signed(at=instance.now)) is None
    assert await instance.call(headers) == Code.FLEET_SIGNATURE_INVALID


async def test_what_is_remembered_of_signatures_is_bounded() -> None:
    instance = Instance()
    seen = instance.guard._seen
    for number in range(2 * MAX_REMEMBERED):
        assert seen.add(f"{number}", NOW)
    assert len(seen._newer) + len(seen._older) <= MAX_REMEMBERED
    assert not seen.add(f"{2 * MAX_REMEMBERED - 1}", NOW)


async def test_while_a_key_is_changed_both_are_accepted() -> None:
    old, new = make_fleet_key(), make_fleet_key()
    instance = Instance(FleetKey([new, old]))
    for key in (old, new):
        assert await instance.call(signed(FleetKey([key]))) is None
        assert instance.is_of_fleet


@pytest.mark.parametrize(
    ("peer", "is_of_fleet"), [("127.0.0.1", True), ("::1", True), ("192.0.2.1", False), ("testclient", False)]
)
async def test_without_a_key_the_machines_own_processes_are_the_fleet(peer: str, is_of_fleet: bool) -> None:
    instance = Instance(key=None)
    assert await instance.call(signed(), peer=peer) is None
    assert instance.is_of_fleet is is_of_fleet


@pytest.mark.parametrize("name", ["X-Forwarded-For", "X-Forwarded-Proto", "Forwarded", "X-Real-IP", "Via"])
async def test_without_a_key_whoever_a_reverse_proxy_speaks_for_is_not_of_the_fleet(name: str) -> None:
    instance = Instance(key=None)
    assert await instance.call({name: "192.0.2.1"}, peer="127.0.0.1") is None
    assert instance.is_of_fleet is False


def test_who_does_not_belong_to_the_fleet_is_told_what_to_do() -> None:
    with pytest.raises(ForbiddenError, match=r"^Giving KV back is for .*--fleet-key-file"):
        check_fleet(caller_of({"type": "http"}), "Giving KV back")
