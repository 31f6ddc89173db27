"""A client that notes when each token arrives."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec
from prometheus_client.samples import Sample

from chiasm.bench.statistics import median
from chiasm.errors import ChiasmError
from chiasm.fleet_key import FleetKey, make_fleet_key
from chiasm.http.fleet_calls import body_digest, signature
from chiasm.http.timing import read_timing
from chiasm.prometheus import read_samples
from chiasm.wire import (
    CHAT_PATH,
    PLACES_PATH,
    TIMING_COMMENT,
    EmbeddingPlaces,
    ErrorBody,
    ErrorDetail,
    Health,
    ProxyHealth,
)

_TIMEOUT = aiohttp.ClientTimeout(total=300)
_HEALTH_PATH = "/health"
_MAX_QUOTED = 500
"""Characters of a response that an error message quotes."""
_DATA, _DONE = b"data: ", b"data: [DONE]"
_TIMING = f": {TIMING_COMMENT} ".encode()


class RequestFailedError(ChiasmError):
    """A request of the bench was not answered with status 200; the message has the status and the server's reason."""

    def __init__(self, message: str, http_status: int | None = None) -> None:
        """``http_status`` is None if there was no answer, or if a stream ended early."""
        super().__init__(message)
        self.http_status = http_status


@dataclass
class StreamedAnswer:
    """A streamed answer as the client sees it. Times are those of ``time.perf_counter()``."""

    sent: float
    """When the client began to send the request."""
    token_times: list[float] = field(default_factory=list)
    """When each event with a token arrived."""
    tokens: list[str] = field(default_factory=list)
    """The tokens, if the request asked for log probabilities."""
    text: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    timing: dict[str, float] = field(default_factory=dict)
    """Durations of all Server-Timing entries in seconds; of two with the same name, the later one."""
    timing_at_start: dict[str, float] = field(default_factory=dict)
    """The durations in the response's headers: those of the first instance if two give the answer."""
    outcomes: dict[str, str] = field(default_factory=dict)
    """Descriptions of Server-Timing entries, such as ``hit``, ``waited`` or ``encoded`` of ``item0``."""
    error: str | None = None
    """The message of the event that ended the stream early."""

    @property
    def ttft_seconds(self) -> float:
        """Time from sending the request to the first token."""
        return self.token_times[0] - self.sent

    @property
    def gaps_seconds(self) -> list[float]:
        """Time between each event with a token and the next."""
        return [after - before for before, after in zip(self.token_times, self.token_times[1:], strict=False)]

    @property
    def tpot_seconds(self) -> float:
        """Mean time per token after the first. Raises ChiasmError unless there are log probabilities of two tokens or more."""
        if len(self.tokens) < 2:
            raise ChiasmError("An answer of fewer than two tokens has no time per token.")
        return (self.token_times[-1] - self.token_times[0]) / (len(self.tokens) - 1)

    def first_and_later_gaps(self) -> tuple[float, float]:
        """Return the seconds between tokens one and two, and the median of all later gaps. Raises ChiasmError."""
        first, *others = self.gaps_seconds
        if len(others) < 2:
            raise ChiasmError(f"An answer arrived in {len(self.token_times)} events, too few to compare their gaps.")
        return first, median(others)

    def note_timing(self, server_timing: str | None) -> None:
        """Add the entries of a Server-Timing value."""
        entries = read_timing(server_timing)
        self.timing |= _durations(server_timing)
        self.outcomes |= {entry.name: entry.description for entry in entries if entry.description}

    def take(self, line: bytes, now: float) -> None:
        """Add one line of the stream, which arrived at ``now``."""
        if line.startswith(_TIMING):
            self.note_timing(line.removeprefix(_TIMING).decode())
        if not line.startswith(_DATA) or line == _DONE:
            return
        event = _event.decode(line.removeprefix(_DATA))
        if event.error is not None:
            self.error = event.error.message[:_MAX_QUOTED]
        if event.usage is not None:
            self.prompt_tokens = event.usage.prompt_tokens
            self.completion_tokens = event.usage.completion_tokens
            details = event.usage.prompt_tokens_details
            self.cached_tokens = (details.cached_tokens or 0) if details is not None else 0
        for choice in event.choices:
            tokens = choice.logprobs.content if choice.logprobs is not None else []
            if choice.delta.content or tokens:
                self.token_times.append(now)
                self.text += choice.delta.content or ""
                self.tokens += [entry.token for entry in tokens]


class _Delta(msgspec.Struct):
    content: str | None = None


class _Token(msgspec.Struct):
    token: str


class _Logprobs(msgspec.Struct):
    content: list[_Token]


class _Choice(msgspec.Struct):
    delta: _Delta
    logprobs: _Logprobs | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: _Details | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: ErrorDetail | None = None


_event = msgspec.json.Decoder(_Event)


class Client:
    """Sends chat completions over connections that it keeps open; made by ``opened``."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session
        self.fleet_key = FleetKey([make_fleet_key()])
        """The key of the deployments that are measured."""

    async def chat(self, url: str, body: bytes) -> StreamedAnswer:
        """Post a chat completion with ``stream: true`` and read it to its end. Raises RequestFailedError."""
        answer: StreamedAnswer | None = None
        async for current in self.follow(url, body):
            answer = current
        if answer is None or not answer.token_times:
            raise RequestFailedError(f"{url} answered without a token.")
        return answer

    async def follow(self, url: str, body: bytes) -> AsyncGenerator[StreamedAnswer, None]:
        """Yield the answer so far after each piece that arrives. Closing the generator ends the request."""
        answer = StreamedAnswer(time.perf_counter())
        async with self._posted(url, body) as response:
            answer.note_timing(response.headers.get("server-timing"))
            answer.timing_at_start = dict(answer.timing)
            rest = b""
            async for chunk in response.content.iter_any():
                now = time.perf_counter()
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    answer.take(line, now)
                if answer.error is not None:
                    raise RequestFailedError(f"{url} ended its stream with an error: {answer.error}")
                yield answer

    async def post(self, url: str, body: bytes, *, as_proxy: bool = False) -> tuple[float, Mapping[str, float], Any]:
        """Post a chat completion that is not streamed; ``as_proxy`` signs it, as a proxy does what it sends to instances.

        Returns the seconds until the response was complete, its Server-Timing in seconds, and its JSON.
        """
        started = time.perf_counter()
        async with self._posted(url, body, as_proxy=as_proxy) as response:
            content = await response.read()
            seconds = time.perf_counter() - started
            return seconds, _durations(response.headers.get("server-timing")), msgspec.json.decode(content)

    async def tell_place(self, reader: str, encoder: str, identifier: str) -> None:
        """Tell a PD at ``reader`` that the encoder has an embedding, or will, as a proxy does. Raises RequestFailedError.

        Otherwise the PD would wait for it, unless encoders publish where all find it.
        """
        try:
            async with self._session.get(encoder + _HEALTH_PATH) as response:
                place = msgspec.json.decode(await response.read(), type=Health).ec_place
            if place is None:
                return
            body = msgspec.json.encode(EmbeddingPlaces(places={identifier: place}))
            headers = signature(self.fleet_key, "POST", PLACES_PATH, body_digest(body))
            async with self._session.post(reader + PLACES_PATH, data=body, headers=headers) as response:
                if not response.ok:
                    raise RequestFailedError(f"{reader} answered {response.status}: {_reason(await response.read())}")
        except (aiohttp.ClientError, TimeoutError, msgspec.DecodeError) as error:
            raise RequestFailedError(f"{encoder} or {reader} did not answer: {error}") from error

    async def proxy_health(self, url: str) -> ProxyHealth:
        """Return what a proxy says of itself and its instances. Raises RequestFailedError."""
        try:
            async with self._session.get(url + _HEALTH_PATH) as response:
                return msgspec.json.decode(await response.read(), type=ProxyHealth)
        except (aiohttp.ClientError, TimeoutError, msgspec.DecodeError) as error:
            raise RequestFailedError(f"{url}{_HEALTH_PATH} did not answer: {error}") from error

    async def metrics(self, url: str) -> list[Sample]:
        """Return the samples of GET /metrics."""
        async with self._session.get(url + "/metrics") as response:
            return read_samples(await response.text())

    @asynccontextmanager
    async def _posted(self, url: str, body: bytes, *, as_proxy: bool = False) -> AsyncIterator[aiohttp.ClientResponse]:
        """Post a chat completion; the response has status 200. Raises RequestFailedError, also for failures inside."""
        headers = {"content-type": "application/json"}
        if as_proxy:
            headers |= signature(self.fleet_key, "POST", CHAT_PATH, body_digest(body))
        try:
            async with self._session.post(url + CHAT_PATH, data=body, headers=headers) as response:
                if response.status != 200:
                    reason = _reason(await response.read())
                    raise RequestFailedError(f"{url} answered {response.status}: {reason}", response.status)
                yield response
        except (aiohttp.ClientError, TimeoutError) as error:
            raise RequestFailedError(f"{url} did not answer: {type(error).__name__}: {error}") from error


@asynccontextmanager
async def opened() -> AsyncIterator[Client]:
    """A client that opens as many connections as it needs."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30)
    async with aiohttp.ClientSession(connector=connector, timeout=_TIMEOUT, trust_env=False) as session:
        yield Client(session)


def _durations(server_timing: str | None) -> dict[str, float]:
    return {entry.name: entry.seconds for entry in read_timing(server_timing) if entry.seconds is not None}


def _reason(content: bytes) -> str:
    """Return the message of an error body, or the beginning of whatever else it is."""
    try:
        message = msgspec.json.decode(content, type=ErrorBody).error.message
    except (msgspec.DecodeError, UnicodeDecodeError):
        message = ""
    return (message or content.decode(errors="replace"))[:_MAX_QUOTED]
