"""Clients that are slow, that leave, or that are hostile, each for one connection; they speak HTTP as bytes.

An *act* is what such a client does once. It returns the statuses of the answers that it saw.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import struct
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from chiasm.bench.requests import data_url, photo
from chiasm.wire import CHAT_PATH

_PATIENCE_SECONDS = 15.0
"""After so long a client gives up, whatever it waits for."""
_SLOW_SECONDS = 5.0
"""How long a slow client takes for what others do at once."""
_PIECES = 20
_KEPT_BYTES = 1 << 16
_MIB = 1 << 20
_SIDE = 192
"""Of images, in pixels."""
_TOKENS = 48


@dataclass(frozen=True)
class Target:
    """Where requests go, and what they ask for."""

    url: str
    model: str

    def chat(self, content: Any, **fields: Any) -> bytes:
        """Return the body of a chat completion."""
        messages = [{"role": "user", "content": content}]
        return json.dumps({"model": self.model, "messages": messages, "max_tokens": _TOKENS, **fields}).encode()

    def post(self, body: bytes, *fields: str, path: str = CHAT_PATH, length: int | None = None) -> bytes:
        """Return a request with a body, which may declare another length than it has."""
        lines = [
            f"POST {path} HTTP/1.1",
            f"Host: {urlsplit(self.url).netloc}",
            "Content-Type: application/json",
            *fields,
        ]
        lines.append(f"Content-Length: {len(body) if length is None else length}")
        return "\r\n".join([*lines, "", ""]).encode() + body

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[_Connection]:
        """A connection, which is reset at the end unless the server has closed it."""
        parts = urlsplit(self.url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 80, limit=_KEPT_BYTES)
        try:
            yield _Connection(reader, writer)
        finally:
            writer.transport.abort()


@dataclass(frozen=True)
class _Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def status(self) -> int:
        """Read the head of an answer; return 0 if the server closes instead."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        return int(head.split(b" ", 2)[1])

    async def statuses(self) -> list[int]:
        """Return the statuses of all answers until the server closes, as far as they begin lines that look like it."""
        found: list[int] = []
        rest = b""
        while piece := await self.reader.read(_KEPT_BYTES):
            *lines, rest = (rest + piece).split(b"\n")
            found += [int(line[9:12]) for line in lines if line.startswith(b"HTTP/1.1 ") and line[9:12].isdigit()]
            rest = rest[-_KEPT_BYTES:]
        return found


Act = Callable[[Target, random.Random], Awaitable[list[int]]]


async def perform(act: Act, target: Target, seed: int) -> list[int] | None:
    """Do it once, with what its seed draws. Return the statuses, or None if the server cut the connection first."""
    with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE_SECONDS):
                return await act(target, random.Random(seed))
        return []
    return None


def _text(random_: random.Random) -> str:
    return f"{random_.random()} " + "word " * random_.randrange(1, 60)


def _image(random_: random.Random) -> list[dict[str, Any]]:
    """Return a question about an image that nobody has sent before."""
    url = data_url(photo(str(random_.random()), _SIDE))
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is shown?"}]


def _question(random_: random.Random) -> Any:
    return _text(random_) if random_.random() < 0.5 else _image(random_)


# ---- ordinary ones, whose answers nobody knows ---------------------------------------------------------------------------


async def _asks_something_new(target: Target, random_: random.Random) -> list[int]:
    async with target.connected() as connection:
        await connection.send(target.post(target.chat(_question(random_)), "Connection: close"))
        return await connection.statuses()


# ---- slow ones -----------------------------------------------------------------------------------------------------------


async def _slowly(connection: _Connection, data: bytes) -> None:
    size = max(1, len(data) // _PIECES)
    for start in range(0, len(data), size):
        await connection.send(data[start : start + size])
        await asyncio.sleep(_SLOW_SECONDS / _PIECES)


async def _sends_slowly(target: Target, random_: random.Random) -> list[int]:
    async with target.connected() as connection:
        await _slowly(connection, target.post(target.chat(_question(random_)), "Connection: close"))
        return await connection.statuses()


async def _reads_slowly(target: Target, random_: random.Random) -> list[int]:
    async with target.connected() as connection:
        body = target.chat(_question(random_), stream=True, ignore_eos=True, logprobs=True, top_logprobs=20)
        await connection.send(target.post(body, "Connection: close"))
        status = await connection.status()
        for _ in range(_PIECES):
            await connection.reader.read(200)
            await asyncio.sleep(_SLOW_SECONDS / _PIECES)
        return [status]


async def _says_nothing(target: Target, random_: random.Random) -> list[int]:
    async with target.connected() as connection:
        await asyncio.wait({asyncio.ensure_future(connection.reader.read())}, timeout=_SLOW_SECONDS)
        return []


# ---- those that leave ----------------------------------------------------------------------------------------------------


async def _leaves_at_the_first_token(target: Target, random_: random.Random) -> list[int]:
    async with target.connected() as connection:
        await connection.send(target.post(target.chat(_question(random_), stream=True, ignore_eos=True)))
        status = await connection.status()
        await connection.reader.readuntil(b"data: ")
        return [status]


async def _leaves_after_asking(target: Target, random_: random.Random) -> list[int]:
    async with target.connected() as connection:
        await connection.send(target.post(target.chat(_question(random_))))
        await asyncio.sleep(random_.random() / 5)
        return []


async def _leaves_within_its_body(target: Target, random_: random.Random) -> list[int]:
    async with target.connected() as connection:
        whole = target.post(target.chat(_image(random_)))
        await connection.send(whole[: random_.randrange(len(whole))])
        return []


# ---- hostile ones --------------------------------------------------------------------------------------------------------


async def _sends_no_http(target: Target, random_: random.Random) -> list[int]:
    async with target.connected() as connection:
        await connection.send(random_.randbytes(random_.choice([5, 5000, 200_000])))
        return await connection.statuses()


async def _sends_no_http_behind_a_request(target: Target, random_: random.Random) -> list[int]:
    async with target.connected() as connection:
        await connection.send(target.post(target.chat(_text(random_))) + b"\0" * random_.choice([1, 5000, 200_000]))
        return await connection.statuses()


async def _sends_an_endless_head(target: Target, random_: random.Random) -> list[int]:
    async with target.connected() as connection:
        await connection.send(b"GET / HTTP/1.1\r\n" + b"name: value\r\n" * 50_000)
        return await connection.statuses()


async def _declares_more_than_it_may_send(target: Target, random_: random.Random) -> list[int]:
    async with target.connected() as connection:
        await connection.send(target.post(b"{" * _MIB, "Connection: close", length=10 << 30))
        return await connection.statuses()


async def _posts(target: Target, body: bytes, *fields: str) -> list[int]:
    async with target.connected() as connection:
        await connection.send(target.post(body, "Connection: close", *fields))
        return await connection.statuses()


async def _sends_bad_json(target: Target, random_: random.Random) -> list[int]:
    whole = target.chat("hello")
    bodies = [
        whole[:-1],
        b"[" * 100_000,
        b"\xff" * 100,
        b"{}",
        b'{"messages": [{"role": 7}]}',
        b"[" + b"{}," * 500_000 + b"1]",
    ]
    return await _posts(target, random_.choice(bodies))


async def _asks_for_too_much(target: Target, random_: random.Random) -> list[int]:
    fields: list[Mapping[str, Any]] = [
        {"n": 10_000},
        {"max_tokens": 1 << 40},
        {"logit_bias": {str(token): 1 for token in range(5000)}},
        {"stop": ["x"] * 10_000},
        {"top_logprobs": 10_000, "logprobs": True},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}}},
        {"tools": [{"type": "function", "function": {"name": f"f{index}"}} for index in range(2000)]},
        {"kv_transfer_params": {"do_remote_prefill": True, "remote_request_id": "x", "remote_block_ids": [0]}},
    ]
    return await _posts(target, target.chat("hello " * random_.choice([1, 100_000]), **random_.choice(fields)))


async def _fills_the_queue(target: Target, random_: random.Random) -> list[int]:
    return await _posts(target, target.chat(_text(random_), n=16, ignore_eos=True))


async def _sends_a_bad_image(target: Target, random_: random.Random) -> list[int]:
    jpeg, claims = photo("soak", 32), struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", claims) + _chunk(b"IDAT", b"")
    files = [
        jpeg[: len(jpeg) // 2],
        jpeg[:2] + b"\xff\xe1\x00\x04ab" * 100_000 + jpeg[2:],
        jpeg[:2] + b"\0" * _MIB + jpeg[2:],
        png,
        b"GIF89a" + random_.randbytes(200),
        b"II*\0" + random_.randbytes(200),
        random_.randbytes(500),
    ]
    url = data_url(random_.choice(files))
    return await _posts(target, target.chat([{"type": "image_url", "image_url": {"url": url}}]))


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


async def _names_sites_that_are_not_there(target: Target, random_: random.Random) -> list[int]:
    urls = [f"http://127.0.0.1:{random_.randrange(1, 1000)}/{index}" for index in range(4)]
    content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return await _posts(target, target.chat(content))


async def _looks_for_pages(target: Target, random_: random.Random) -> list[int]:
    paths = ["/instances", "/../etc/passwd", "/v1/models/x", "/metrics", "/embeddings/awaited", "/kv/release", "/%00"]
    async with target.connected() as connection:
        method = random_.choice(["GET", "POST", "DELETE", "OPTIONS"])
        head = f"{method} {random_.choice(paths)} HTTP/1.1\r\nHost: evil.example\r\nOrigin: https://evil.example\r\n"
        await connection.send(f"{head}Connection: close\r\nContent-Length: 0\r\n\r\n".encode())
        return await connection.statuses()


async def _reads_no_answers(target: Target, random_: random.Random) -> list[int]:
    async with target.connected() as connection:
        body = target.chat(_text(random_), n=8, ignore_eos=True, logprobs=True, top_logprobs=20)
        await connection.send(target.post(body) * 3)
        await asyncio.sleep(_SLOW_SECONDS)
        return []


ACTS: Mapping[str, tuple[Act, ...]] = {
    "new": (_asks_something_new,),
    "slow": (_sends_slowly, _reads_slowly, _says_nothing),
    "leaving": (_leaves_at_the_first_token, _leaves_after_asking, _leaves_within_its_body),
    "hostile": (
        _sends_no_http,
        _sends_no_http_behind_a_request,
        _sends_an_endless_head,
        _declares_more_than_it_may_send,
        _sends_bad_json,
        _asks_for_too_much,
        _fills_the_queue,
        _sends_a_bad_image,
        _names_sites_that_are_not_there,
        _looks_for_pages,
        _reads_no_answers,
    ),
}
"""By the kind of client."""
