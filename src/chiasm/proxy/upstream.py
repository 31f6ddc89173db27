"""HTTP to instances."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from types import TracebackType

import aiohttp
import msgspec

from chiasm.errors import ChiasmError

_KEEP_ALIVE_SECONDS = 3.0
"""Below the 5 s after which uvicorn, on the other side, closes idle connections, so that we aren't the one surprised."""


class UpstreamError(ChiasmError):
    """An instance broke off, or answered what cannot be passed on."""

    status = 502
    kind = "upstream_error"


class BrokenOffError(UpstreamError):
    """A connection that ended in the middle of an answer."""


class InstanceLostError(UpstreamError):
    """A connection that ended before any answer: another instance may be asked."""


class NoAnswerInTimeError(InstanceLostError):
    """It may be gone, or only busy."""


class NoConnectionError(InstanceLostError):
    """Nobody there: no connection came about."""


class _Words(msgspec.Struct):
    message: str = ""
    type: str = ""
    param: str | None = None
    code: str | int | None = None


class _Told(msgspec.Struct):
    error: _Words


_told = msgspec.json.Decoder(_Told)


class ToldError(ChiasmError):
    """What an instance says went wrong, in its own words where they have the shape of the OpenAI API's errors."""

    status = 502
    kind = "upstream_error"

    def __init__(self, body: bytes, otherwise: str) -> None:
        try:
            words = _told.decode(body).error
        except (msgspec.MsgspecError, UnicodeDecodeError):
            words = _Words()
        code = words.code if words.code is None else str(words.code)
        super().__init__(words.message or otherwise, param=words.param, code=code)
        self.kind = words.type or self.kind
        if isinstance(words.code, int) and 400 <= words.code <= 599:  # vLLM's way to tell the status
            self.status = words.code

    @property
    def is_kv_unavailable(self) -> bool:
        """D says that the prompt must be prefilled again."""
        return self.code == "kv_unavailable" or self.kind == "kv_unavailable_error"

    @property
    def is_preempted(self) -> bool:
        """D gives up an answer that it has no room for any more."""
        return self.code == "preempted"

    @property
    def is_leaving(self) -> bool:
        """The instance ends, or its engine has; it says so as long as it can."""
        return self.code in {"stopping", "failed"}


class AnsweredError(ToldError):
    """An instance answered with an error status; its answer goes to the client as it is."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.body, f"an instance answered with status {answer.status}")
        self.status = answer.status
        self.answer = answer


class Answer:
    """A whole answer of an instance."""

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body


class Call:
    """An instance's answer whose head is here. Close it; closing early cancels the call there."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status
        self.headers: Mapping[str, str] = response.headers

    @property
    def is_stream(self) -> bool:
        return self._response.content_type == "text/event-stream"

    def check_status(self) -> None:
        """Raises UpstreamError if this is neither an answer nor an error."""
        if self.status != 200 and not 400 <= self.status <= 599:
            raise UpstreamError(f"the instance answered with status {self.status}")

    async def chunk(self) -> bytes:
        """What has arrived; empty at the end. Raises BrokenOffError if the connection breaks."""
        try:
            return await self._response.content.readany()
        except (aiohttp.ClientError, OSError) as error:
            raise BrokenOffError("the instance broke off while it answered") from error

    async def read(self, max_bytes: int) -> Answer:
        """The rest of the answer. Raises BrokenOffError if it breaks off, UpstreamError if it is too long."""
        body = bytearray()
        while chunk := await self.chunk():
            body += chunk
            if len(body) > max_bytes:
                raise UpstreamError(f"the instance's answer is longer than {max_bytes:,} bytes")
        return Answer(self.status, self.headers, bytes(body))

    def close(self) -> None:
        """Gives the connection back if the answer was read to its end, else closes it."""
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
        """Send a JSON body and wait for the answer's head. Raises InstanceLostError."""
        try:
            response = await self._session.post(
                url,
                data=_send(body),
                headers={**headers, "Content-Type": "application/json", "Content-Length": str(len(body))},
                allow_redirects=False,
            )
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise NoConnectionError("the instance is unreachable") from error
        except (aiohttp.ClientError, OSError) as error:
            raise InstanceLostError("the instance broke off before it answered") from error
        return Call(response)

    async def get(self, url: str, *, timeout_seconds: float, max_bytes: int) -> Answer:
        """Raises UpstreamError, also if it takes too long."""
        try:
            async with self._session.get(
                url, allow_redirects=False, timeout=aiohttp.ClientTimeout(total=timeout_seconds)
            ) as response:
                return await Call(response).read(max_bytes)
        except TimeoutError as error:
            raise NoAnswerInTimeError(f"no answer within {timeout_seconds:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise InstanceLostError("unreachable, or broke off") from error


async def _send(body: bytes) -> AsyncIterator[bytes]:
    # Bytes given as such make aiohttp warn where they are large.
    yield body
