"""What the client reads from headers, streams and metrics."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web

from chiasm.bench.client import Client, RequestFailedError, StreamedAnswer, opened
from chiasm.errors import ChiasmError
from chiasm.launch.ports import HeldPort
from chiasm.wire import CHAT_PATH

_EVENTS = (
    b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'
    b'data: {"choices":[{"index":0,"delta":{"content":"he"},"logprobs":{"content":[{"token":"he","logprob":0}]}}]}\n\n',
    b'data: {"choices":[{"index":0,"delta":{"content":"llo"},"logprobs":null}]}\n\nda',
    b'ta: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":3}}}\n\n'
    b': server-timing prefill;dur=4.5, item0;desc="hit";dur=0.1\n\ndata: [DONE]\n\n',
)


@asynccontextmanager
async def _serving(
    method: str, path: str, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_route(method, path, handler)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def _server(events: tuple[bytes, ...], status: int = 200) -> AsyncIterator[str]:
    async def answer(request: web.Request) -> web.StreamResponse:
        reply = web.StreamResponse(status=status, headers={"server-timing": "proxy;dur=1.25"})
        await reply.prepare(request)
        for chunk in events:
            await reply.write(chunk)
            await asyncio.sleep(0.02)
        return reply

    async with _serving("POST", CHAT_PATH, answer) as url:
        yield url


async def test_a_stream_is_read_with_the_time_of_each_token() -> None:
    async with _server(_EVENTS) as url, opened() as client:
        answer = await client.chat(url, b"{}")
    assert answer.text == "hello"
    assert answer.tokens == ["he"]
    assert len(answer.token_times) == 2
    assert answer.ttft_seconds > 0
    assert answer.gaps_seconds[0] > 0
    assert (answer.prompt_tokens, answer.cached_tokens, answer.completion_tokens) == (7, 3, 2)
    assert answer.timing == {"proxy": 0.00125, "prefill": 0.0045, "item0": 0.0001}
    assert answer.timing_at_start == {"proxy": 0.00125}
    assert answer.outcomes == {"item0": "hit"}


async def test_an_error_of_a_refused_request_quotes_the_reason() -> None:
    async with _server((b'{"error":{"message":"no room"}}',), status=503) as url, opened() as client:
        with pytest.raises(RequestFailedError, match=r"503.*no room"):
            await client.chat(url, b"{}")
        with pytest.raises(RequestFailedError, match=r"503.*no room"):
            await client.post(url, b"{}")


async def test_a_stream_that_breaks_off_is_an_error() -> None:
    async with _server((_EVENTS[0], b'data: {"error":{"message":"gone"}}\n\n')) as url, opened() as client:
        with pytest.raises(RequestFailedError, match="gone"):
            await client.chat(url, b"{}")


async def test_a_server_that_is_not_there_is_an_error() -> None:
    nobody = HeldPort("127.0.0.1")
    async with opened() as client:
        with pytest.raises(RequestFailedError, match="did not answer"):
            await client.chat(nobody.url, b"{}")
    nobody.release()


async def test_an_answer_that_takes_too_long_is_an_error() -> None:
    async with _server(_EVENTS) as url, aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=0.01)) as session:
        with pytest.raises(RequestFailedError, match="did not answer: TimeoutError"):
            await Client(session).chat(url, b"{}")


def test_server_timing_is_read_in_seconds() -> None:
    header = 'fetch;dur=2.00, queue;dur=0.5, item0;desc="waited";dur=12, odd'
    answer = StreamedAnswer(0.0)
    answer.note_timing(header)
    assert answer.timing == {"fetch": 0.002, "queue": 0.0005, "item0": 0.012}
    assert answer.outcomes == {"item0": "waited"}


async def test_usage_without_details_is_read() -> None:
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":1,"prompt_tokens_details":null}}\n\n'
    async with _server((_EVENTS[0], usage)) as url, opened() as client:
        answer = await client.chat(url, b"{}")
    assert (answer.prompt_tokens, answer.cached_tokens, answer.completion_tokens) == (7, 0, 1)


async def test_time_per_token_counts_all_tokens_even_if_two_arrive_at_once() -> None:
    def event(*tokens: str) -> bytes:
        entries = ",".join(f'{{"token":"{token}"}}' for token in tokens)
        return f'data: {{"choices":[{{"delta":{{"content":"x"}},"logprobs":{{"content":[{entries}]}}}}]}}\n\n'.encode()

    async with _server((event("a"), event("b", "c"), event("d"))) as url, opened() as client:
        answer = await client.chat(url, b"{}")
    assert answer.tokens == ["a", "b", "c", "d"]
    assert answer.tpot_seconds == (answer.token_times[-1] - answer.token_times[0]) / 3


async def test_one_token_has_no_time_per_token() -> None:
    async with _server((_EVENTS[0],)) as url, opened() as client:
        answer = await client.chat(url, b"{}")
    with pytest.raises(ChiasmError, match="fewer than two"):
        _ = answer.tpot_seconds


async def test_metrics_are_read() -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(text='# TYPE a counter\na{outcome="hit"} 2.0\na{outcome="waited"} 1.0\n')

    async with _serving("GET", "/metrics", answer) as url, opened() as client:
        samples = await client.metrics(url)
    assert [(one.name, one.labels, one.value) for one in samples] == [
        ("a", {"outcome": "hit"}, 2.0),
        ("a", {"outcome": "waited"}, 1.0),
    ]
