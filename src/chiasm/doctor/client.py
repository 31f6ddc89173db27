"""HTTP to whatever stands at an address: it may not be chiasm, may never answer, and may answer without end."""

from __future__ import annotations

import asyncio
import json
import re
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any

import aiohttp

from chiasm.doctor.base import shown

PAGE_SECONDS = 5.0
"""For /health, /metrics and the like."""
MAX_PAGE_BYTES = 4 << 20
_OUTCOME = re.compile(r'\bitem0;desc="([a-z]{1,16})"')
_CONNECT_SECONDS = 3.0
"""Less than for a page: that nobody takes the connection says something else than that nobody answers."""


class NoAnswerError(Exception):
    """Why there is no answer that could be used; the text goes on after an address."""


class NoConnectionError(NoAnswerError):
    """Nobody could be reached from this machine."""


@dataclass(frozen=True)
class Answer:
    """A whole answer."""

    status: int
    body: bytes
    clock_seconds: float | None
    """How far the sender's clock is ahead of this machine's, to about a second; None if it doesn't say."""
    outcome: str = ""
    """What became of the request's first image, as ``Server-Timing`` of the built-in engine says: ``hit``, ``encoded``, …"""

    def json(self) -> dict[str, Any]:
        """The JSON object that it holds. Raises NoAnswerError."""
        try:
            found = json.loads(self.body)
        except (ValueError, RecursionError):
            raise NoAnswerError(f"answered what is no JSON: {shown(self.text(), 80)!r}") from None
        if not isinstance(found, dict):
            raise NoAnswerError("answered JSON that is no object")
        return found

    def text(self) -> str:
        return self.body.decode("utf-8", errors="replace")

    def complaint(self) -> str:
        """What an answer with an error status says of the error."""
        try:
            error = self.json().get("error")
        except NoAnswerError:
            return shown(self.text())
        message = error.get("message") if isinstance(error, dict) else None
        return shown(message or self.text())


class Client:
    """Each call has a bound of time, from the first byte sent to the last received, and of size. No redirects, no proxies."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Client:
        self._session = aiohttp.ClientSession(
            trust_env=False,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"accept-encoding": "identity", "connection": "close", "user-agent": "chiasm-doctor"},
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._session is not None
        await self._session.close()

    async def get(self, url: str, *, timeout_seconds: float | None = None, max_bytes: int = MAX_PAGE_BYTES) -> Answer:
        """Within ``PAGE_SECONDS``, if nothing else is said. Raises NoAnswerError."""
        return await self._ask("GET", url, None, {}, timeout_seconds or PAGE_SECONDS, max_bytes)

    async def post(self, url: str, body: object, *, timeout_seconds: float, max_bytes: int = MAX_PAGE_BYTES) -> Answer:
        """Send JSON; the instance is told the deadline. Raises NoAnswerError."""
        headers = {"content-type": "application/json", "x-request-deadline-ms": str(round(timeout_seconds * 900))}
        return await self._ask("POST", url, json.dumps(body).encode(), headers, timeout_seconds, max_bytes)

    async def _ask(
        self, method: str, url: str, body: bytes | None, headers: dict[str, str], timeout_seconds: float, max_bytes: int
    ) -> Answer:
        assert self._session is not None
        began = time.time()
        try:
            async with asyncio.timeout(timeout_seconds):
                async with self._session.request(
                    method, url, data=body, headers=headers, allow_redirects=False
                ) as response:
                    clock = _ahead(response.headers.get("date"), began, time.time())
                    outcome = _OUTCOME.search(response.headers.get("server-timing", ""))
                    body = await _read(response, max_bytes)
                    return Answer(response.status, body, clock, outcome[1] if outcome else "")
        except aiohttp.ConnectionTimeoutError:
            raise NoConnectionError(f"cannot be reached: no connection within {_CONNECT_SECONDS:g} s") from None
        except TimeoutError:
            raise NoAnswerError(f"did not answer within {timeout_seconds:g} s") from None
        except aiohttp.ClientSSLError as error:
            raise NoAnswerError(f"has no certificate that could be verified: {shown(error)}") from None
        except aiohttp.ClientConnectorError as error:
            raise NoConnectionError(f"cannot be reached: {shown(error.os_error.strerror or error)}") from None
        except aiohttp.InvalidURL:
            raise NoAnswerError("is no URL that can be asked") from None
        except aiohttp.ServerDisconnectedError:
            raise NoAnswerError("closed the connection without an answer") from None
        except aiohttp.ClientResponseError as error:
            raise NoAnswerError(f"does not speak HTTP: {shown(error.message)}") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise NoAnswerError(f"broke off: {shown(error)}") from None


async def _read(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    chunks: list[bytes] = []
    held = 0
    while chunk := await response.content.readany():
        held += len(chunk)
        if held > max_bytes:
            response.close()
            raise NoAnswerError(f"answered with more than {max_bytes} bytes")
        chunks.append(chunk)
    return b"".join(chunks)


def _ahead(date: str | None, began: float, ended: float) -> float | None:
    """By a Date header, which leaves out fractions of its second."""
    try:
        said = parsedate_to_datetime(date or "").timestamp()
    except (ValueError, TypeError, OverflowError):
        return None
    return said + 0.5 - (began + ended) / 2
