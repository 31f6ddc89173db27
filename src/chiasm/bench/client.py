"""A client that notes when each token came."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

from chiasm.errors import ChiasmError

CHAT = "/v1/chat/completions"
_TIMEOUT = aiohttp.ClientTimeout(total=300)
_DURATION = re.compile(r"([\w-]+)(?:;[^,]*?)?;dur=([\d.]+)")
_DESCRIPTION = re.compile(r'([\w-]+);desc="([^"]*)"')
_SAMPLE = re.compile(r"^([\w:]+)(?:\{([^}]*)\})? (\S+)$", re.MULTILINE)


class RequestFailedError(ChiasmError):
    """A request of the bench was not answered with 200; the message has the status and what the server said."""


@dataclass
class Answer:
    """A streamed answer as the client saw it."""

    sent: float
    """``time.perf_counter()`` when the request began to be sent."""
    token_times: list[float] = field(default_factory=list)
    """When each event with a token came, on the same clock."""
    tokens: list[str] = field(default_factory=list)
    """The tokens, where log probabilities were asked for."""
    text: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    timing: dict[str, float] = field(default_factory=dict)
    """Durations of all Server-Timing entries in seconds; of two of one name, the later."""
    timing_at_start: dict[str, float] = field(default_factory=dict)
    """Those of the response's head: of an answer that two instances give, the first one's."""
    outcomes: dict[str, str] = field(default_factory=dict)
    """Descriptions of Server-Timing entries: ``item0`` is ``hit``, ``waited``, ``encoded``."""
    error: str | None = None
    """Of a stream that broke off."""

    @property
    def ttft_seconds(self) -> float:
        """From the request's first byte to the first token."""
        return self.token_times[0] - self.sent

    @property
    def gaps_seconds(self) -> list[float]:
        """Between each token and the next."""
        return [after - before for before, after in zip(self.token_times, self.token_times[1:], strict=False)]

    @property
    def tpot_seconds(self) -> float:
        """From one token to the next on average; of an answer with log probabilities, which tell the tokens of an event.

        Raises ChiasmError for fewer than two tokens.
        """
        if len(self.tokens) < 2:
            raise ChiasmError("an answer of fewer than two tokens has no time per token")
        return (self.token_times[-1] - self.token_times[0]) / (len(self.tokens) - 1)


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
    choices: list[_Choice] = msgspec.field(default_factory=list)
    usage: _Usage | None = None
    error: dict[str, Any] | None = None


_event = msgspec.json.Decoder(_Event)


class Client:
    """Keeps connections open between requests; close it with ``opened``."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def chat(self, url: str, body: bytes) -> Answer:
        """Post a chat completion with ``stream: true`` and read it to its end. Raises RequestFailedError."""
        answer: Answer | None = None
        async for current in self.follow(url, body):
            answer = current
        assert answer is not None
        if not answer.token_times:
            raise RequestFailedError(f"{url} answered without a token")
        return answer

    async def follow(self, url: str, body: bytes) -> AsyncGenerator[Answer, None]:
        """The answer so far, again after everything that came, and at the end. Leaving it ends the request."""
        sent = time.perf_counter()
        try:
            async with self._session.post(url + CHAT, data=body, headers={"content-type": "application/json"}) as reply:
                if reply.status != 200:
                    raise RequestFailedError(f"{url} answered {reply.status}: {(await reply.text())[:500]}")
                answer = Answer(sent)
                _note_timing(answer, reply.headers.get("server-timing", ""))
                answer.timing_at_start = dict(answer.timing)
                rest = b""
                async for chunk in reply.content.iter_any():
                    now = time.perf_counter()
                    *lines, rest = (rest + chunk).split(b"\n")
                    for line in lines:
                        _take(answer, line, now)
                    if answer.error is not None:
                        raise RequestFailedError(f"{url} broke off its stream: {answer.error[:500]}")
                    yield answer
        except (aiohttp.ClientError, TimeoutError) as error:
            raise RequestFailedError(f"{url} did not answer: {type(error).__name__}: {error}") from error

    async def post(self, url: str, body: bytes) -> tuple[float, Mapping[str, float], Any]:
        """Post a chat completion that is not streamed.

        Returns the seconds until its answer was complete, its Server-Timing in seconds, and its JSON.
        """
        started = time.perf_counter()
        try:
            async with self._session.post(url + CHAT, data=body, headers={"content-type": "application/json"}) as reply:
                content = await reply.read()
                seconds = time.perf_counter() - started
                if reply.status != 200:
                    raise RequestFailedError(f"{url} answered {reply.status}: {content[:500].decode(errors='replace')}")
                return seconds, durations(reply.headers.get("server-timing", "")), msgspec.json.decode(content)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise RequestFailedError(f"{url} did not answer: {type(error).__name__}: {error}") from error

    async def metrics(self, url: str) -> dict[str, float]:
        """Samples of GET /metrics by name, labels included as Prometheus writes them."""
        async with self._session.get(url + "/metrics") as reply:
            return samples(await reply.text())


@asynccontextmanager
async def opened() -> AsyncIterator[Client]:
    """A client with as many connections as are needed."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30)
    async with aiohttp.ClientSession(connector=connector, timeout=_TIMEOUT, trust_env=False) as session:
        yield Client(session)


def durations(server_timing: str) -> dict[str, float]:
    """Entries of a Server-Timing header that have a duration, in seconds."""
    return {name: float(milliseconds) / 1000 for name, milliseconds in _DURATION.findall(server_timing)}


def samples(exposition: str) -> dict[str, float]:
    """Samples of Prometheus' text format."""
    found: dict[str, float] = {}
    for name, labels, value in _SAMPLE.findall(exposition):
        found[f"{name}{{{labels}}}" if labels else name] = float(value)
    return found


def total(found: Mapping[str, float], name: str) -> float:
    """A metric's sum over its labels; 0 where there is none yet."""
    return sum(value for sample, value in found.items() if sample.partition("{")[0] == name)


def _take(answer: Answer, line: bytes, now: float) -> None:
    if line.startswith(b": server-timing "):
        _note_timing(answer, line.removeprefix(b": server-timing ").decode())
    if not line.startswith(b"data: ") or line == b"data: [DONE]":
        return
    event = _event.decode(line.removeprefix(b"data: "))
    if event.error is not None:
        answer.error = str(event.error.get("message"))
    if event.usage is not None:
        answer.prompt_tokens = event.usage.prompt_tokens
        answer.completion_tokens = event.usage.completion_tokens
        details = event.usage.prompt_tokens_details
        answer.cached_tokens = (details.cached_tokens or 0) if details is not None else 0
    for choice in event.choices:
        tokens = choice.logprobs.content if choice.logprobs is not None else []
        if choice.delta.content or tokens:
            answer.token_times.append(now)
            answer.text += choice.delta.content or ""
            answer.tokens += [entry.token for entry in tokens]


def _note_timing(answer: Answer, server_timing: str) -> None:
    answer.timing |= durations(server_timing)
    answer.outcomes |= dict(_DESCRIPTION.findall(server_timing))
