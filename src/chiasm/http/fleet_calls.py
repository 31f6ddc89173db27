"""Calls that only processes of a fleet may make: signed by the one that calls, checked by the one that answers.

Such a call names images and embeddings, hands KV over, or says for whom it is. A signature is one header. It covers method,
path, body, and what the call says about its client. It holds for a minute on the clock of the instance that is called; the
instance tells its clock in /health, so the clocks of machines may differ. An instance takes each signature once.

An instance without a fleet key believes those who call from its own machine for themselves, and nobody else.
"""

from __future__ import annotations

import hmac
import re
import secrets
import time
from collections.abc import Callable
from typing import NamedTuple

from blake3 import blake3
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chiasm.errors import Code, ForbiddenError
from chiasm.fleet_key import FleetKey
from chiasm.http.errors import error_response
from chiasm.http.neighbours import comes_from_here, is_forwarded
from chiasm.wire import CLIENT_HEADER, FLEET_HEADER

VALID_SECONDS = 60
"""How far the time in a signature may be from the instance's clock."""
MAX_REMEMBERED = 1 << 16
"""Signatures of which an instance remembers that it has seen them; when there are more, it forgets the older half early."""
_USE = "stage call"
_HEADER = re.compile(r"1 (\d{1,15}) ([0-9a-f]{32}) ([0-9a-f]{64}) ([0-9a-f]{64})", re.ASCII)
_KEY = "chiasm.caller"


class Caller(NamedTuple):
    """Who makes a call."""

    is_of_fleet: bool
    reason: str = ""
    """Why it counts as a stranger: a clause about the request."""


# ---- the one that calls ------------------------------------------------------------------------------------------------


class OtherClock:
    """The clock of who is called, as it last told it. It goes on while this machine is suspended."""

    def __init__(self) -> None:
        self._ahead_seconds: float | None = None

    def set(self, milliseconds: int | None) -> None:
        """Take what it says now in Unix time; None if that isn't known."""
        self._ahead_seconds = None if milliseconds is None else milliseconds / 1000 - _unbroken_seconds()

    @property
    def milliseconds(self) -> int | None:
        """What it says now; None if it has told nothing."""
        ahead = self._ahead_seconds
        return None if ahead is None else int((_unbroken_seconds() + ahead) * 1000)


def _unbroken_seconds() -> float:
    """Return seconds of a clock that nobody sets. On Linux, that of ``time.monotonic`` stands still while it is suspended."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def body_digest(body: bytes) -> bytes:
    """Return what a signature says about a body (BLAKE3)."""
    return blake3(body).digest()


def signature(
    key: FleetKey, method: str, path: str, digest: bytes, *, clock_milliseconds: int | None = None, client: str = ""
) -> dict[str, str]:
    """Return the header that signs a call.

    ``digest`` is that of its body, ``clock_milliseconds`` the Unix time on the clock of the instance that is called (None: on
    this machine's), ``client`` the value of CLIENT_HEADER.
    """
    if clock_milliseconds is None:
        clock_milliseconds = int(time.time() * 1000)
    nonce = secrets.token_hex(16)
    mac = key.mac(_USE, *_signed(method, path, clock_milliseconds, nonce, digest, client))
    return {FLEET_HEADER: f"1 {clock_milliseconds} {nonce} {digest.hex()} {mac.hex()}"}


def _signed(method: str, path: str, clock_milliseconds: int, nonce: str, digest: bytes, client: str) -> list[bytes]:
    return [method.encode(), path.encode(), b"%d" % clock_milliseconds, nonce.encode(), digest, client.encode()]


# ---- the one that is called --------------------------------------------------------------------------------------------


class FleetGuard:
    """Notes of each request whether a process of the fleet makes it; refuses wrong signatures before the body is read.

    Handlers ask :func:`check_fleet` before they do what only the fleet may ask for. Anybody may ask for the rest.
    """

    def __init__(self, app: ASGIApp, key: FleetKey | None, clock: Callable[[], float] = time.time) -> None:
        self._app = app
        self._key = key
        self._clock = clock
        self._seen = _Seen()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                scope, receive = self._checked(scope, receive)
            except ForbiddenError as error:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _checked(self, scope: Scope, receive: Receive) -> tuple[Scope, Receive]:
        """Return the scope with its caller, and a ``receive`` that refuses another body than was signed."""
        if self._key is None:
            return {**scope, _KEY: _neighbour(scope)}, receive
        headers = Headers(scope=scope)
        given = headers.get(FLEET_HEADER)
        if given is None:
            return {**scope, _KEY: Caller(False, "it is not signed with the fleet key")}, receive
        digest = self._digest_in(self._key, given, scope, headers.get(CLIENT_HEADER, ""))
        return {**scope, _KEY: Caller(True)}, _with_digest(receive, digest)

    def _digest_in(self, key: FleetKey, given: str, scope: Scope, client: str) -> bytes:
        """Return the digest of the body that a valid signature names. Raises ForbiddenError."""
        found = _HEADER.fullmatch(given)
        if found is None:
            raise _invalid("it has another form than this version of chiasm knows")
        signed_at, nonce, digest, mac = int(found[1]), found[2], bytes.fromhex(found[3]), bytes.fromhex(found[4])
        if not key.is_mac(mac, _USE, *_signed(scope["method"], scope["path"], signed_at, nonce, digest, client)):
            raise _invalid("it was made with another fleet key, or for another request")
        late_seconds = self._clock() - signed_at / 1000
        if abs(late_seconds) > VALID_SECONDS:
            raise _invalid(f"it is {late_seconds:.0f} seconds old, and {VALID_SECONDS} are allowed")
        if not self._seen.add(nonce, self._clock()):
            raise _invalid("it has been used before")
        return digest


def caller_of(scope: Scope) -> Caller:
    """Return who makes a request, as the guard has noted it."""
    caller: Caller = scope.get(_KEY, Caller(False, "this server doesn't know its fleet"))
    return caller


def check_fleet(caller: Caller, what: str) -> None:
    """Raise ForbiddenError unless a process of the fleet calls. ``what`` begins a sentence: what strangers may not ask for."""
    if not caller.is_of_fleet:
        raise ForbiddenError(
            f"{what} is for the processes of this fleet alone, and this request is not from one of them: {caller.reason}. "
            "Send requests to the proxy; start the proxy with the fleet key of its instances (--fleet-key-file).",
            code=Code.FLEET_KEY_NEEDED,
        )


def _neighbour(scope: Scope) -> Caller:
    """Return the caller of a server without a key: one of the fleet if it calls from this machine, for itself."""
    if not comes_from_here(scope):
        return Caller(False, "it comes from another machine, and this instance has no fleet key")
    if is_forwarded(scope):
        return Caller(False, "a reverse proxy passes it on, and this instance has no fleet key")
    return Caller(True)


def _with_digest(receive: Receive, digest: bytes) -> Receive:
    hasher = blake3()

    async def checked() -> Message:
        message = await receive()
        if message["type"] == "http.request":
            hasher.update(message.get("body", b""))
            if not message.get("more_body", False) and not hmac.compare_digest(hasher.digest(), digest):
                raise _invalid("it was made for another body")
        return message

    return checked


def _invalid(reason: str) -> ForbiddenError:
    return ForbiddenError(
        f"The signature of the request ({FLEET_HEADER}) is not valid: {reason}. Give the proxy and all instances the same "
        "fleet key (--fleet-key-file).",
        code=Code.FLEET_SIGNATURE_INVALID,
    )


class _Seen:
    """The signatures of the last minutes: each counts once."""

    def __init__(self) -> None:
        self._newer: set[str] = set()
        self._older: set[str] = set()
        self._since = 0.0

    def add(self, nonce: str, now: float) -> bool:
        """Return whether it is new, and remember it."""
        if abs(now - self._since) > 2 * VALID_SECONDS or len(self._newer) >= MAX_REMEMBERED // 2:
            self._newer, self._older, self._since = set(), self._newer, now
        if nonce in self._newer or nonce in self._older:
            return False
        self._newer.add(nonce)
        return True
