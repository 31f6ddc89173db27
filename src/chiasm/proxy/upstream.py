"""HTTP to instances: calls, responses, and the ways in which they fail."""

from __future__ import annotations

import asyncio
import math
import os
import socket
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import NamedTuple

import msgspec

from chiasm import __version__
from chiasm.errors import ChiasmError, Code
from chiasm.fleet_key import FleetKey
from chiasm.http.body import joined
from chiasm.http.client import HttpClient, NoConnectionError
from chiasm.http.client_connection import NotHttpError, Response
from chiasm.http.fleet_calls import OtherClock, body_digest, signature
from chiasm.http.timing import TimingEntry, read_timing
from chiasm.http.vanished import break_if_vanished
from chiasm.wire import CLIENT_HEADER, UNREADABLE, ErrorBody, ErrorDetail

_KEEP_ALIVE_SECONDS = 3.0
"""Shorter than uvicorn's default of 5 s, so that the proxy never sends on a connection that the instance is just closing."""
_VANISHED_SECONDS = 8.0
"""How long another machine may answer nothing at all before the connections to it break."""
_INLINE_BYTES = 1 << 20
"""Up to this size a body is hashed, for its signature, on the event loop."""
_FULL_KINDS = ("overloaded_error", "Service Unavailable")
"""How the errors of a full instance are called by chiasm, and by vLLM, which has a limit by ``--max-num-queued-reqs``."""
_OF_GATEWAYS = frozenset({502, 503})
"""What a reverse proxy or a sidecar answers in words of its own when it doesn't reach the instance behind it. After 504 the
instance may still be at work, so no other one gets the request."""
_error = msgspec.json.Decoder(ErrorBody)


class UpstreamError(ChiasmError):
    """An instance was lost, or sent a response that cannot be passed on."""

    status = 502
    kind = "upstream_error"


class ResponseCutOffError(UpstreamError):
    """The connection was lost in the middle of a response."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code=Code.INSTANCE_LOST)


class InstanceLostError(UpstreamError):
    """The connection was lost before any response: another instance may be called."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code=Code.INSTANCE_LOST)


class NoResponseInTimeError(InstanceLostError):
    """The instance may be gone, or only busy."""


class UnreachableError(InstanceLostError):
    """No connection could be made."""


class InstanceError(ChiasmError):
    """An error that an instance reports: its message, type, param and code, if they have the shape of the OpenAI API."""

    status = 502
    kind = "upstream_error"

    def __init__(self, body: bytes, fallback: str) -> None:
        """``fallback`` is the message if ``body`` holds none."""
        try:
            detail = _error.decode(body).error
        except UNREADABLE:
            detail = ErrorDetail()
        code = detail.code if detail.code is None else str(detail.code)
        super().__init__(detail.message or fallback, param=detail.param, code=code)
        self.is_explained = bool(detail.message)
        """Whether ``body`` holds an error."""
        self.kind = detail.type or self.kind
        if isinstance(detail.code, int) and 400 <= detail.code <= 599:  # vLLM puts the status there
            self.status = detail.code

    @property
    def is_kv_unavailable(self) -> bool:
        """Whether the prompt must be prefilled again, because its KV is lost."""
        return self.code == Code.KV_UNAVAILABLE or self.kind == "kv_unavailable_error"

    @property
    def is_preempted(self) -> bool:
        """Whether a decode instance ran out of room for the answer."""
        return self.code == Code.PREEMPTED

    @property
    def is_leaving(self) -> bool:
        """Whether the instance can't take requests: it is starting or shutting down, or its engine has failed."""
        return self.code in {Code.STARTING, Code.STOPPING, Code.FAILED}

    @property
    def is_full(self) -> bool:
        """Whether the instance has no room now: another one may be tried, or the same one later."""
        if self.status not in {429, 503} or self.is_leaving:
            return False
        return self.code == Code.TOO_MANY_REQUESTS or self.kind in _FULL_KINDS


class RefusedError(InstanceError):
    """An instance answered with an error status; its response goes to the client as it is."""

    def __init__(self, response: UpstreamResponse) -> None:
        super().__init__(response.body, f"An instance answered with status {response.status}.")
        self.status = response.status
        self.response = response

    @property
    def refuses_signature(self) -> bool:
        """Whether it isn't the request that is refused: the instance's clock may have been set, which a probe tells."""
        return self.code == Code.FLEET_SIGNATURE_INVALID

    @property
    def is_leaving(self) -> bool:
        """Also whether another instance, or this one after a probe, may take what was refused."""
        is_unreached = self.status in _OF_GATEWAYS and not self.is_explained
        return super().is_leaving or self.refuses_signature or is_unreached


class UpstreamResponse(NamedTuple):
    """A whole response of an instance."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    timing: Sequence[TimingEntry]
    """Its ``Server-Timing``."""


class Line:
    """The calls of one instance that are under way, when it was last heard of, and what its clock says."""

    def __init__(self) -> None:
        self.clock = OtherClock()
        """The instance's."""
        self.heard_at = -math.inf
        """When the last byte of a response arrived, on the clock of ``time.monotonic``."""
        self._ways_to_end: dict[object, Callable[[], None]] = {}

    def __len__(self) -> int:
        """How many calls are under way."""
        return len(self._ways_to_end)

    def hear(self) -> None:
        """Note that the instance has sent something."""
        self.heard_at = time.monotonic()

    def begin(self, call: object, end: Callable[[], None]) -> None:
        """Count a call, which ``end`` breaks off."""
        self._ways_to_end[call] = end

    def leave(self, call: object) -> None:
        """Count a call no more."""
        self._ways_to_end.pop(call, None)

    def break_off(self) -> int:
        """End all calls as if their connections were lost; return how many there were."""
        ways, self._ways_to_end = self._ways_to_end, {}
        for end in ways.values():
            end()
        return len(ways)


class Call:
    """A call of an instance whose response has begun. Close it; closing it early cancels the request there."""

    def __init__(self, response: Response, line: Line) -> None:
        self._response = response
        self._line = line
        self._is_broken_off = False
        line.begin(self, self._break_off)
        self.status = response.status
        self.headers: Mapping[str, str] = response.headers
        self.timing: Sequence[TimingEntry] = read_timing(response.headers.get("server-timing"))

    @property
    def is_stream(self) -> bool:
        return self.headers.get("content-type", "").partition(";")[0].strip().lower() == "text/event-stream"

    async def chunk(self) -> bytes:
        """Return what has arrived; empty at the end. Raises ResponseCutOffError."""
        try:
            chunk = await self._response.chunk()
        except OSError as error:
            what = "An instance stopped responding" if self._is_broken_off else "The connection to an instance was lost"
            raise ResponseCutOffError(f"{what} in the middle of its answer; try again.") from error
        if chunk:
            self._line.hear()
        return chunk

    async def read(self, max_bytes: int) -> UpstreamResponse:
        """Return the whole response. Raises ResponseCutOffError, and UpstreamError if it is too long."""
        chunks: list[bytes] = []
        size_bytes = 0
        while chunk := await self.chunk():
            chunks.append(chunk)
            size_bytes += len(chunk)
            if size_bytes > max_bytes:
                raise UpstreamError(f"The answer of an instance is longer than the limit of {max_bytes} bytes.")
        return UpstreamResponse(self.status, self.headers, await joined(chunks, size_bytes), self.timing)

    async def check(self, max_bytes: int) -> None:
        """Raise RefusedError if the status is an error, UpstreamError if it is neither that nor 200."""
        if self.status == 200:
            return
        if not 400 <= self.status <= 599:
            raise UpstreamError(f"An instance answered with status {self.status}.")
        raise RefusedError(await self.read(max_bytes))

    def close(self) -> None:
        """Give the connection back if the response was read to its end; otherwise close it."""
        self._line.leave(self)
        self._response.close()

    def _break_off(self) -> None:
        self._is_broken_off = True
        self._response.close()

    def __enter__(self) -> Call:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Upstream:
    """The connections to all instances. Made and used on one event loop."""

    def __init__(self, connect_timeout_seconds: float, fleet_key: FleetKey | None = None) -> None:
        """``fleet_key`` signs all calls except those that anybody may make."""
        self.fleet_key = fleet_key
        self._client = HttpClient(
            connect_seconds=connect_timeout_seconds,
            keep_seconds=_KEEP_ALIVE_SECONDS,
            prepare=lambda made: break_if_vanished(made, _VANISHED_SECONDS),
            headers={"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": f"chiasm/{__version__}"},
        )
        self._lines: dict[str, Line] = {}

    def close(self) -> None:
        self._client.close()

    def line(self, instance_url: str) -> Line:
        """Return the calls of the instance at this base URL."""
        return self._lines.setdefault(instance_url, Line())

    def forget(self, instance_url: str) -> None:
        """Keep nothing about an instance that was removed."""
        self._lines.pop(instance_url, None)

    async def signed(
        self,
        instance_url: str,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> Mapping[str, str]:
        """Return the headers of a call with its signature, if there is a fleet key."""
        key = self.fleet_key
        if key is None:
            return headers
        is_small = len(body) <= _INLINE_BYTES
        digest = body_digest(body) if is_small else await asyncio.to_thread(body_digest, body)
        clock, client = self.line(instance_url).clock.milliseconds, headers.get(CLIENT_HEADER, "")
        return {**headers, **signature(key, method, path, digest, clock_milliseconds=clock, client=client)}

    async def post(
        self, instance_url: str, path: str, body: bytes, headers: Mapping[str, str], *, line: Line | None = None
    ) -> Call:
        """Send a JSON body and wait for the head of the response. Raises InstanceLostError.

        It counts as work of the instance unless another ``line`` is given.
        """
        line = self.line(instance_url) if line is None else line
        sent = {**await self.signed(instance_url, "POST", path, body, headers), "Content-Type": "application/json"}
        try:
            async with asyncio.timeout(None) as limit:
                line.begin(limit, lambda: _expire(limit))
                response = await self._client.request("POST", instance_url + path, sent, body)
        except NoConnectionError as error:
            raise UnreachableError("An instance is unreachable; try again.") from error
        except OSError as error:  # a TimeoutError is one
            what = "An instance stopped responding" if limit.expired() else "The connection to an instance was lost"
            raise InstanceLostError(f"{what} before it answered; try again.") from error
        finally:
            line.leave(limit)
        line.hear()
        return Call(response, line)

    async def get(
        self,
        url: str,
        *,
        max_bytes: int,
        timeout_seconds: float | None = None,
        headers: Mapping[str, str] | None = None,
        line: Line | None = None,
    ) -> UpstreamResponse:
        """Return the response, however long it takes if no timeout is given. Raises UpstreamError.

        It counts as work of the instance if its ``line`` is given, and ends when the instance is given up.
        """
        line = Line() if line is None else line
        try:
            async with asyncio.timeout(timeout_seconds) as limit:
                line.begin(limit, lambda: _expire(limit))
                with Call(await self._client.request("GET", url, headers or {}), Line()) as call:
                    whole = await call.read(max_bytes)
        except TimeoutError as error:
            raise NoResponseInTimeError("no connection in time") from error
        except OSError as error:
            if isinstance(error.__cause__, TimeoutError):
                raise NoResponseInTimeError("no connection in time") from error
            raise InstanceLostError(_reason(error)) from error
        finally:
            line.leave(limit)
        line.hear()
        return whole


def _expire(limit: asyncio.Timeout) -> None:
    if not limit.expired():  # by itself, just now
        limit.reschedule(0)


def _reason(error: Exception) -> str:
    """Return why a question has no answer, for the operator."""
    if isinstance(error, NotHttpError):
        return f"it does not answer in HTTP ({error}); name it https:// if it has a certificate"
    if not isinstance(error, NoConnectionError):
        return "the connection failed or was lost"
    cause = error.__cause__
    if isinstance(cause, ssl.SSLCertVerificationError):
        fault = cause.verify_message or "it is not valid"
        return f"its certificate is not trusted ({fault}); name the authority that signed it in SSL_CERT_FILE"
    if isinstance(cause, ssl.SSLError):
        return "it does not speak TLS as https needs it; name it http:// if it has no certificate"
    if isinstance(cause, socket.gaierror | UnicodeError):
        return "its host is not known to the name service"
    if isinstance(cause, OSError) and cause.errno is not None:
        return f"no connection can be made: {os.strerror(cause.errno)}"
    return "the connection failed or was lost"
