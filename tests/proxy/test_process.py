"""The proxy as a process: start, signals, imports, memory."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from chiasm.errors import ConfigurationError
from chiasm.http.listen import check_url
from chiasm.proxy import ProxyConfig, run

from .conftest import ask, image, image_bytes
from .instances import FakeInstance, Received, chat, event, never

PROGRAM = """
import sys
from chiasm.proxy import ProxyConfig, run
config = ProxyConfig(port=0, pds=(sys.argv[1],), encoders=(sys.argv[2],), shutdown_timeout_seconds=20)
run(config, on_ready=lambda url: print(url, flush=True))
print("ended", flush=True)
"""


@asynccontextmanager
async def proxy(pd: FakeInstance, encoder: FakeInstance) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    await pd.start()
    await encoder.start()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM, pd.url, encoder.url, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        yield process, (await asyncio.wait_for(process.stdout.readline(), 120)).decode().strip()
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await pd.kill()
        await encoder.kill()


async def until_stopping(session: aiohttp.ClientSession, url: str) -> None:
    """Return when the proxy's /health says that it is stopping."""
    while True:
        async with session.get(f"{url}/health") as response:
            if (await response.json())["status"] == "stopping":
                assert response.status == 503
                return


async def test_after_a_signal_a_stream_ends_whole_and_new_requests_are_refused() -> None:
    pd, encoder = FakeInstance("pd"), FakeInstance("encoder")
    go = asyncio.Event()

    async def when_told(instance: FakeInstance, request: Any, received: Received) -> Any:
        await go.wait()
        return await chat(instance, request, received)

    pd.answer = when_told
    async with proxy(pd, encoder) as (process, url), aiohttp.ClientSession() as session:
        asked = asyncio.ensure_future(
            session.post(f"{url}/v1/chat/completions", json=ask("x", image(image_bytes()), stream=True))
        )
        await pd.arrived.acquire()
        process.send_signal(signal.SIGTERM)
        await until_stopping(session, url)
        async with session.post(f"{url}/v1/chat/completions", json=ask("x")) as refused:
            assert refused.status == 503
            assert (await refused.json())["error"]["code"] == "stopping"
            assert refused.headers["Connection"] == "close"
        go.set()
        async with await asked as response:
            assert (await response.read()).endswith(b"data: [DONE]\n\n")
        output, errors = await process.communicate()
        assert process.returncode == 0
        assert output.strip() == b"ended"
        assert errors.count(b"\n") == 1, errors
        assert b"code=stopping" in errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_ends_the_process_soon_and_quietly_even_during_a_stream(number: signal.Signals) -> None:
    pd, encoder = FakeInstance("pd"), FakeInstance("encoder")

    async def endless(instance: FakeInstance, request: Any, received: Received) -> Any:
        from aiohttp import web

        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(event("one"))
        return await never(instance, request, received)

    pd.answer = endless
    async with proxy(pd, encoder) as (process, url), aiohttp.ClientSession() as session:
        async with session.post(f"{url}/v1/chat/completions", json=ask("x", stream=True)) as response:
            assert await response.content.readuntil(b"\n\n") == event("one")
            process.send_signal(number)
            await until_stopping(session, url)
            process.send_signal(number)
            rest = await response.read()
        output, errors = await process.communicate()
        assert process.returncode == 0
        assert b"shutting down" in rest
        assert output.strip() == b"ended"
        assert errors.count(b"\n") == 1, errors
        assert b"code=stopping" in errors
        await asyncio.wait_for(pd.gone.acquire(), 60)


def peak_kib(pid: int) -> int:
    """Return the peak resident memory of a process."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")[2].split()[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_line_that_waits_in_the_log_is_written_at_the_end(number: signal.Signals) -> None:
    pd = FakeInstance("pd")
    await pd.start()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "chiasm", "proxy", "--port", "0", "--pd", pd.url),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        url = (await asyncio.wait_for(process.stdout.readline(), 120)).decode().split()[-1]
        async with aiohttp.ClientSession() as session:
            async with session.post(
                f"{url}/v1/chat/completions", json=ask("x"), headers={"X-Request-Id": "me"}
            ) as answer:
                assert answer.status == 200
                process.send_signal(number)
            _, log = await asyncio.wait_for(process.communicate(), 120)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await pd.kill()
    assert (process.returncode, log.count(b"chiasm.access: id=me POST")) == (0, 1)


async def test_memory_stays_below_the_bound() -> None:
    pd, encoder = FakeInstance("pd"), FakeInstance("encoder")
    large = image_bytes(size=(700, 500), format="BMP")
    assert len(large) > 1 << 20
    async with proxy(pd, encoder) as (process, url), aiohttp.ClientSession() as session:
        for n in range(20):
            async with session.post(f"{url}/v1/chat/completions", json=ask(str(n), image(large))) as response:
                assert response.status == 200, await response.read()
        assert peak_kib(process.pid) < 120 * 1024
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0


def test_neither_media_nor_proxy_load_torch_transformers_or_numpy() -> None:
    program = (
        "import sys, chiasm.media, chiasm.proxy;"
        "print([name for name in ('torch', 'transformers', 'numpy', 'tokenizers') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert done.stdout.strip() == "[]"


def test_a_port_in_use_is_one_clear_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"Port {port} on 127.0.0.1 is in use"):
            run(ProxyConfig(port=port, pds=("http://127.0.0.1:1",)))


@pytest.mark.parametrize(
    "config",
    [
        {"encoders": ("http://a:1",)},
        {"pds": ("http://a:1", "http://a:1/")},
        {"pds": ("http://a:1",), "encoders": ("http://a:1",)},
        {"pds": ("a:1",)},
        {"pds": ("http://a:1",), "deadline_seconds": 0},
        {"pds": ("http://a:1",), "max_concurrent_requests": -1},
        {"pds": ("http://a:1",), "max_prefill_attempts": 0},
        {"prefills": ("http://a:1",)},
        {"decodes": ("http://a:1",)},
        {"prefills": ("http://a:1",), "decodes": ("http://a:1",)},
        {"prefills": ("http://a:1",), "decodes": ("http://b:1",), "pds": ("http://c:1",)},
        {"prefills": ("http://a:1",), "decodes": ("http://b:1",), "aggregated": ("http://c:1",)},
        {"prefills": ("http://a:1",), "aggregated": ("http://c:1",), "admin_key": "k" * 16},
    ],
)
def test_an_impossible_configuration_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        ProxyConfig(**config)


@pytest.mark.parametrize(
    "config",
    [
        {"prefills": ("http://a:1",), "decodes": ("http://b:1", "http://c:1"), "encoders": ("http://d:1",)},
        {"prefills": ("http://a:1",), "admin_key": "k" * 16},
        {"admin_key": "k" * 16},
    ],
)
def test_a_possible_configuration_is_accepted(config: dict[str, Any]) -> None:
    assert ProxyConfig(**config).max_prefill_attempts == 4


@pytest.mark.parametrize(
    "url", ["", "a", "http://", "ftp://a", "http://a/v1", "http://a?x", "http://a:port", "http://[a"]
)
def test_malformed_base_urls_are_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="http://host:port"):
        check_url(url)


def test_base_urls_lose_their_final_slash() -> None:
    assert [check_url(url) for url in ("http://a:1/", "https://[::1]:2")] == ["http://a:1", "https://[::1]:2"]
