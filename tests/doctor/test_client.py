"""Whatever is at an address: a response arrives in time and has a bounded size, or the reason is clear."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from chiasm.doctor.client import Client, Limits, NoAnswerError
from chiasm.fleet_key import FleetKey, make_fleet_key
from chiasm.launch.ports import HeldPort
from chiasm.wire import FLEET_HEADER, Health

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def talking(talk: Talk, context: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """A server that does as ``talk`` says with each connection."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await talk(reader, writer)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=context)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


def saying(text: bytes) -> Talk:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(text)
        await writer.drain()

    return talk


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def dripping(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Never long without a byte, and never done."""
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    while True:
        writer.write(b" ")
        await writer.drain()
        await asyncio.sleep(0.01)


async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        writer.write(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
        await writer.drain()


OTHER = b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"
ENDLESS_HEADER = b"HTTP/1.1 200 OK\r\nX: " + b"x" * (1 << 20)


@pytest.mark.parametrize(
    ("talk", "message"),
    [
        (silent, "did not answer within 0.5 s"),
        (dripping, "did not answer within 0.5 s"),
        (endless, "more than 100000 bytes"),
        (saying(b"220 mail.example.org ESMTP\r\n"), "does not speak HTTP"),
        (saying(b""), "closed the connection without an answer"),
        (saying(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf"), "in the middle of its answer"),
        (saying(ENDLESS_HEADER), "does not speak HTTP"),
    ],
    ids=["silent", "dripping", "endless", "mail", "closing", "half", "endless header"],
)
async def test_an_unusable_response_is_explained(talk: Talk, message: str) -> None:
    limits = Limits(page_seconds=0.5 if talk in (silent, dripping) else 20)
    async with talking(talk) as url, Client(limits) as client:
        with pytest.raises(NoAnswerError, match=message):
            await client.get(url, max_bytes=100_000)


async def test_an_address_without_a_server_cannot_be_reached() -> None:
    nobody = HeldPort("127.0.0.1")
    async with Client() as client:
        with pytest.raises(NoAnswerError, match="cannot be reached"):
            await client.get(nobody.url)
    nobody.release()


async def test_a_server_without_tls_has_no_certificate() -> None:
    async with talking(dripping) as url, Client() as client:
        with pytest.raises(
            NoAnswerError, match="no certificate that could be verified; name who signed it in SSL_CERT_FILE"
        ):
            await client.get(url.replace("http:", "https:"))


@pytest.fixture
def self_signed(tmp_path: Path) -> ssl.SSLContext:
    key, certificate = str(tmp_path / "key"), str(tmp_path / "certificate")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1"]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    return context


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
async def test_a_self_signed_certificate_is_not_trusted(self_signed: ssl.SSLContext) -> None:
    async with talking(saying(b""), self_signed) as url, Client() as client:
        with pytest.raises(NoAnswerError, match="no certificate that could be verified"):
            await client.get(url.replace("http:", "https:"))


async def test_redirects_are_not_followed() -> None:
    async with talking(saying(OTHER)) as url, Client() as client:
        assert (await client.get(url)).status == 302


@pytest.mark.parametrize("body", [b"<html>", b"[1]", b'{"a":' * 100_000])
async def test_a_body_that_is_no_json_object_is_explained(body: bytes) -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    async with talking(saying(answer)) as url, Client() as client:
        with pytest.raises(NoAnswerError, match="JSON"):
            (await client.get(url)).read(Health)


@pytest.mark.parametrize("hours", [-2, 2])
async def test_the_date_header_tells_the_clock_of_the_sender(hours: int) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(hours=hours), usegmt=True)
    head = f"HTTP/1.1 200 OK\r\nDate: {date}\r\nContent-Length: 0\r\n\r\n".encode()
    async with talking(saying(head)) as url, Client() as client:
        ahead = (await client.get(url)).clock_seconds
    assert ahead is not None
    assert round(ahead / 3600, 1) == hours


async def test_messages_are_signed_by_the_clock_of_the_one_that_gets_them() -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    key, heads = FleetKey([make_fleet_key()]), list[bytes]()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(f"HTTP/1.1 204 No Content\r\nDate: {date}\r\nConnection: close\r\n\r\n".encode())
        await writer.drain()

    async with talking(talk) as url, Client(fleet_key=key) as client:
        await client.get(url)
        await client.post(url, {})
    (said,) = [line for line in heads[1].decode().splitlines() if line.lower().startswith(FLEET_HEADER.lower())]
    signed_at = datetime.fromtimestamp(int(said.split()[2]) / 1000, UTC)
    assert round((signed_at - datetime.now(UTC)) / timedelta(hours=1), 1) == 1


@pytest.mark.parametrize("date", ["yesterday", "", "Mon, 99 Foo 2026 10:00:00 GMT"])
async def test_a_malformed_date_tells_no_clock(date: str) -> None:
    head = f"HTTP/1.1 200 OK\r\nDate: {date}\r\nContent-Length: 0\r\n\r\n".encode()
    async with talking(saying(head)) as url, Client() as client:
        assert (await client.get(url)).clock_seconds is None


@pytest.mark.parametrize(
    ("key", "message"), [(None, "needs an API key; give it with --api-key"), ("k", "refused the API")]
)
async def test_a_key_is_sent_and_its_lack_explained(key: str | None, message: str) -> None:
    heads: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()

    async with talking(talk) as url, Client(key=key) as client:
        with pytest.raises(NoAnswerError, match=message):
            await client.post(url, {})
    assert (b"authorization: bearer k" in heads[0].lower()) == (key is not None)
