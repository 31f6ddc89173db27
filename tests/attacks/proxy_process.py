"""A proxy as a process, with a fake instance behind it, and those who talk to it in bytes."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

import psutil

from chiasm.prometheus import read_samples, total
from chiasm.wire import CHAT_PATH
from tests.proxy.conftest import ask
from tests.proxy.instances import FakeInstance

SECONDS = 120
"""For what takes milliseconds on a machine that isn't busy."""


@dataclass
class Reply:
    """What came back until the server closed, or until the declared end of the body."""

    head: str
    body: bytes

    @property
    def status(self) -> int:
        """0 if the connection was closed without an answer."""
        return int(self.head.split()[1]) if self.head else 0


@dataclass
class Peer:
    """One connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, data: bytes) -> bool:
        """Send; return whether the server still reads."""
        try:
            self.writer.write(data)
            await asyncio.wait_for(self.writer.drain(), SECONDS)
        except (ConnectionError, TimeoutError):
            return False
        return True

    async def reply(self) -> Reply:
        """Read one answer. Raises ConnectionError if the connection is reset before it is whole."""
        async with asyncio.timeout(SECONDS):
            try:
                head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
            except asyncio.IncompleteReadError:
                return Reply("", b"")
            length = next(int(line[15:]) for line in head.lower().split("\r\n") if line.startswith("content-length:"))
            return Reply(head, await self.reader.readexactly(length))

    async def closed(self) -> bytes:
        """Return what came until the server closed."""
        try:
            return await asyncio.wait_for(self.reader.read(), SECONDS)
        except ConnectionError:
            return b""


@dataclass
class Proxy:
    """A running proxy."""

    url: str
    process: psutil.Process
    peers: list[Peer]

    async def connect(self) -> Peer:
        """Open a connection, which is closed at the end of the test."""
        parts = urlsplit(self.url)
        peer = Peer(*await asyncio.open_connection(parts.hostname, parts.port))
        self.peers.append(peer)
        return peer

    async def good_client(self) -> int:
        """Ask on a connection of its own; return the status of a right answer."""
        body = json.dumps(ask("hello")).encode()
        peer = await self.connect()
        assert await peer.send(post(len(body), "Connection: close") + body)
        reply = await peer.reply()
        peer.writer.close()
        if reply.status == 200:
            assert json.loads(reply.body)["choices"][0]["message"]["content"]
        return reply.status

    async def refusals(self, limit: str) -> float:
        """Return how often the limit has refused something."""
        peer = await self.connect()
        assert await peer.send(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        page = (await peer.reply()).body.decode()
        return total(read_samples(page), "chiasm_http_refusals_total", limit=limit) or 0.0

    @property
    def memory_bytes(self) -> int:
        """What it takes of the machine's memory."""
        return int(self.process.memory_info().rss)


def post(length: int, *fields: str, path: str = CHAT_PATH) -> bytes:
    """Return the head of a request with a body of this length."""
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {length}", *fields]
    return "\r\n".join([*lines, "", ""]).encode()


@asynccontextmanager
async def running(*options: str, descriptors: int = 4096) -> AsyncIterator[Proxy]:
    """Run ``chiasm proxy`` with these options and so many descriptors."""
    pd = FakeInstance("pd")
    await pd.start()
    command = [sys.executable, "-m", "chiasm", "proxy", "--port", "0", "--pd", pd.url, *options]
    process = await asyncio.create_subprocess_exec(
        "sh",
        "-c",
        f'ulimit -n {descriptors}; exec "$@"',
        "sh",
        *command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    proxy: Proxy | None = None
    try:
        assert process.stdout is not None
        line = (await asyncio.wait_for(process.stdout.readline(), SECONDS)).decode()
        proxy = Proxy(line.split()[1], psutil.Process(process.pid), [])
        yield proxy
    finally:
        for peer in proxy.peers if proxy else ():
            peer.writer.transport.abort()
        process.kill()
        await process.wait()
        await pd.kill()
