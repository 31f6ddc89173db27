"""HTTP to whatever is at an address: it may not be chiasm, may never answer, and may never stop answering."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import TypeVar
from urllib.parse import urlsplit

import aiohttp
import msgspec

from chiasm.doctor.report import shown
from chiasm.fleet_key import FleetKey
from chiasm.http.answer import read_beginning
from chiasm.http.fleet_calls import body_digest, signature
from chiasm.http.timing import read_timing
from chiasm.wire import ErrorBody

_MAX_BYTES = 4 << 20
_CONNECT_SECONDS = 3.0
"""Less than for a page, because a connection that isn't accepted means something else than a missing response."""
_Read = TypeVar("_Read")


@dataclass(frozen=True)
class Limits:
    """How long to wait for what."""

    message_seconds: float = 30.0
    """For the response to one request with an image."""
    page_seconds: float = 5.0
    """For /health, /metrics and the like."""
    count_seconds: float = 3.0
    """For an instance's counters to show what it has done."""
    pairs_messages: int = 10
    """For all pairs of instances together, in multiples of ``message_seconds``."""


class NoAnswerError(Exception):
    """Why there is no usable response. The text follows an address: "{url} did not answer within 5 s"."""


class NoConnectionError(NoAnswerError):
    """The address can't be reached from this machine."""


@dataclass(frozen=True)
class Response:
    """A complete response."""

    status: int
    body: bytes
    clock_seconds: float | None
    """How far the sender's clock is ahead of this machine's, to about a second; None if it sends no date."""
    outcome: str = ""
    """What became of the request's first image (``hit``, ``encoded``, …), as the built-in engine's ``Server-Timing`` says."""

    def read(self, kind: type[_Read]) -> _Read:
        """Return the JSON body as a message of this type. Raises NoAnswerError if it is anything else."""
        try:
            return msgspec.json.decode(self.body, type=kind)
        except msgspec.ValidationError as error:
            raise NoAnswerError(f"answered JSON that chiasm doesn't understand: {shown(error)}") from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise NoAnswerError(f"answered something that isn't JSON: {shown(self.text(), 80)!r}") from None

    def text(self) -> str:
        return self.body.decode("utf-8", errors="replace")

    def error_message(self) -> str:
        """Return what a response with an error status says about the error."""
        try:
            return shown(self.read(ErrorBody).error.message or self.text())
        except NoAnswerError:
            return shown(self.text())


class Client:
    """Bounds each call in time, from the first byte sent to the last received, and in size."""

    def __init__(
        self,
        limits: Limits = Limits(),
        key: str | None = None,
        fleet_key: FleetKey | None = None,
        admin_key: str | None = None,
        *,
        goes_outside: bool = False,
    ) -> None:
        """``key`` is the API key for the deployment, ``admin_key`` that of the proxy's operator. ``fleet_key`` signs messages
        as the proxy does, by the clock that the last answer from the same place told. Only one that ``goes_outside`` takes
        the environment's proxies and follows redirects, as a download does."""
        self._admin_key = admin_key
        self._goes_outside = goes_outside
        self.limits = limits
        self.fleet_key = fleet_key
        self._authorization = {"authorization": f"Bearer {key}"} if key else {}
        self._session: aiohttp.ClientSession | None = None
        self._seconds_ahead: dict[str, float] = {}
        """By scheme, host and port: how far the clock there is ahead of this machine's, as its last answer said."""

    async def __aenter__(self) -> Client:
        self._session = aiohttp.ClientSession(
            trust_env=self._goes_outside,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={
                "accept-encoding": "identity",
                "connection": "close",
                "user-agent": "chiasm-doctor",
                **self._authorization,
            },
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._session is not None
        await self._session.close()

    async def get(self, url: str, *, max_bytes: int = _MAX_BYTES) -> Response:
        """Return a page. Raises NoAnswerError."""
        return await self._ask("GET", url, None, {}, self.limits.page_seconds, max_bytes)

    async def get_as_operator(self, url: str) -> Response:
        """Return what the proxy shows its operator alone, or what it shows everybody. Raises NoAnswerError."""
        headers = {"authorization": f"Bearer {self._admin_key}"} if self._admin_key else {}
        return await self._ask("GET", url, None, headers, self.limits.page_seconds, _MAX_BYTES)

    async def post(self, url: str, body: object) -> Response:
        """Send JSON, with the deadline in a header. Raises NoAnswerError, also for an error status."""
        seconds = self.limits.message_seconds
        headers = {"content-type": "application/json", "x-request-deadline-ms": str(round(seconds * 900))}
        content = msgspec.json.encode(body)
        if self.fleet_key is not None:
            clock = int((time.time() + self._seconds_ahead.get(_place(url), 0.0)) * 1000)
            headers |= signature(
                self.fleet_key, "POST", urlsplit(url).path, body_digest(content), clock_milliseconds=clock
            )
        response = await self._ask("POST", url, content, headers, seconds, _MAX_BYTES)
        if response.status == 401:
            raise NoAnswerError(
                "refused the API key; give another one with --api-key"
                if self._authorization
                else "needs an API key; give it with --api-key, --api-key-file or CHIASM_API_KEY"
            )
        if response.status not in (200, 204):
            raise NoAnswerError(f"answered HTTP {response.status}: {response.error_message()}")
        return response

    async def _ask(
        self, method: str, url: str, body: bytes | None, headers: dict[str, str], timeout_seconds: float, max_bytes: int
    ) -> Response:
        assert self._session is not None
        began = time.time()
        try:
            async with (
                asyncio.timeout(timeout_seconds),
                self._session.request(
                    method, url, data=body, headers=headers, allow_redirects=self._goes_outside
                ) as response,
            ):
                clock = _seconds_ahead(response.headers.get("date"), began, time.time())
                if clock is not None:
                    self._seconds_ahead[_place(url)] = clock
                timing = read_timing(response.headers.get("server-timing"))
                outcome = next((entry.description for entry in timing if entry.name == "item0"), "")
                return Response(response.status, await _read(response, max_bytes), clock, outcome)
        except aiohttp.ConnectionTimeoutError:
            raise NoConnectionError(f"cannot be reached: no connection within {_CONNECT_SECONDS:g} s") from None
        except TimeoutError:
            raise NoAnswerError(f"did not answer within {timeout_seconds:g} s") from None
        except aiohttp.ClientSSLError as error:
            raise NoAnswerError(
                f"has no certificate that could be verified; name who signed it in SSL_CERT_FILE: {shown(error)}"
            ) from None
        except aiohttp.ClientConnectorError as error:
            raise NoConnectionError(f"cannot be reached: {shown(error.os_error.strerror or error)}") from None
        except aiohttp.InvalidURL:
            raise NoAnswerError("is not a valid URL") from None
        except aiohttp.ServerDisconnectedError:
            raise NoAnswerError("closed the connection without an answer") from None
        except aiohttp.ClientResponseError as error:
            raise NoAnswerError(f"does not speak HTTP: {shown(error.message)}") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise NoAnswerError(f"closed the connection in the middle of its answer: {shown(error)}") from None


def _place(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


async def _read(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    body = await read_beginning(response, max_bytes + 1)
    if len(body) > max_bytes:
        response.close()
        raise NoAnswerError(f"answered with more than {max_bytes} bytes")
    return body


def _seconds_ahead(date: str | None, began: float, ended: float) -> float | None:
    """Return how far the clock that wrote a ``Date`` header is ahead; the header has no fractions of a second."""
    try:
        said = parsedate_to_datetime(date or "").timestamp()
    except (ValueError, TypeError, OverflowError):
        return None
    return said + 0.5 - (began + ended) / 2
