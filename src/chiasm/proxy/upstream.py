"""HTTP to instances: calls, responses, and the ways in which they fail."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from types import TracebackType
from typing import NamedTuple

import aiohttp
import msgspec

from chiasm.errors import ChiasmError, Code
from chiasm.wire import UNREADABLE, ErrorBody, ErrorDetail

_KEEP_ALIVE_SECONDS = 3.0
"""Shorter than uvicorn's default of 5 s, so that the proxy never sends on a connection that the instance is just closing."""
_error = msgspec.json.Decoder(ErrorBody)


class UpstreamError(ChiasmError):
    """An instance was lost, or sent a response that cannot be passed on."""

    status = 502
    kind = "upstream_error"


class ResponseCutOffError(UpstreamError):
    """The connection was lost in the middle of a response."""


class InstanceLostError(UpstreamError):
    """The connection was lost before any response: another instance may be called."""


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
        """Whether the instance is shutting down, or its engine has failed."""
        return self.code in {Code.STOPPING, Code.FAILED}


class RefusedError(InstanceError):
    """An instance answered with an error status; its response goes to the client as it is."""

    def __init__(self, response: UpstreamResponse) -> None:
        super().__init__(response.body, f"An instance answered with status {response.status}.")
        self.status = response.status
        self.response = response


class UpstreamResponse(NamedTuple):
    """A whole response of an instance."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Call:
    """A call of an instance whose response has begun. Close it; closing it early cancels the request there."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status
        self.headers: Mapping[str, str] = response.headers

    @property
    def is_stream(self) -> bool:
        return self._response.content_type == "text/event-stream"

    async def chunk(self) -> bytes:
        """Return what has arrived; empty at the end. Raises ResponseCutOffError."""
        try:
            return await self._response.content.readany()
        except (aiohttp.ClientError, OSError) as error:
            raise ResponseCutOffError("The connection to an instance was lost in the middle of its answer.") from error

    async def read(self, max_bytes: int) -> UpstreamResponse:
        """Return the whole response. Raises ResponseCutOffError, and UpstreamError if it is too long."""
        body = bytearray()
        while chunk := await self.chunk():
            body += chunk
            if len(body) > max_bytes:
                raise UpstreamError(f"The answer of an instance is longer than the limit of {max_bytes} bytes.")
        return UpstreamResponse(self.status, self.headers, bytes(body))

    async def check(self, max_bytes: int) -> None:
        """Raise RefusedError if the status is an error, UpstreamError if it is neither that nor 200."""
        if self.status == 200:
            return
        if not 400 <= self.status <= 599:
            raise UpstreamError(f"An instance answered with status {self.status}.")
        raise RefusedError(await self.read(max_bytes))

    def close(self) -> None:
        """Give the connection back if the response was read to its end; otherwise close it."""
        self._response.close()

    def __enter__(self) -> Call:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Upstream:
    """The connections to all instances. Made and used on one event loop."""

    def __init__(self, connect_timeout_seconds: float) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_SECONDS, ttl_dns_cache=10),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout_seconds),
            headers={"Accept-Encoding": "identity"},
            skip_auto_headers=("User-Agent",),
        )

    async def close(self) -> None:
        await self._session.close()

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> Call:
        """Send a JSON body and wait for the head of the response. Raises InstanceLostError."""
        try:
            response = await self._session.post(
                url,
                data=_send(body),
                headers={**headers, "Content-Type": "application/json", "Content-Length": str(len(body))},
                allow_redirects=False,
            )
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise UnreachableError("An instance is unreachable.") from error
        except (aiohttp.ClientError, OSError) as error:
            raise InstanceLostError("The connection to an instance was lost before it answered.") from error
        return Call(response)

    async def get(
        self, url: str, *, timeout_seconds: float, max_bytes: int, headers: Mapping[str, str] | None = None
    ) -> UpstreamResponse:
        """Return the response. Raises UpstreamError, also if it takes too long."""
        try:
            async with self._session.get(
                url, allow_redirects=False, timeout=aiohttp.ClientTimeout(total=timeout_seconds), headers=headers
            ) as response:
                return await Call(response).read(max_bytes)
        except TimeoutError as error:
            raise NoResponseInTimeError(f"no response within {timeout_seconds:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise InstanceLostError("the connection failed or was lost") from error


async def _send(body: bytes) -> AsyncIterator[bytes]:
    # aiohttp warns about large bodies that are given as bytes.
    yield body
