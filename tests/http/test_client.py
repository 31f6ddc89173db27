"""Calls of other servers: what these may send, when a connection is used again, what a call that ends early leaves behind."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import ssl
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from chiasm.http import client as client_module
from chiasm.http import trust
from chiasm.http.client import HttpClient, NoConnectionError
from chiasm.http.client_connection import MAX_HEAD_BYTES, NotHttpError, Response

CERTIFICATES = Path(__file__).parents[1] / "media/certificates"
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi"
PATIENCE_SECONDS = 20.0
Script = Callable[["Server", StreamReader, StreamWriter], Awaitable[None]]


class Server:
    """A server that does what a script says with each connection."""

    def __init__(self) -> None:
        self.script: Script = answering(OK)
        self.connections = 0
        self.heads: list[bytes] = []
        self.bodies: list[bytes] = []
        self.ended = asyncio.Semaphore(0)
        """Released for each connection that the client has closed."""
        self.asked = asyncio.Semaphore(0)
        """Released for each request that has come whole."""
        self.url = ""

    async def serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        self.connections += 1
        try:
            await self.script(self, reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            self.ended.release()
        finally:
            writer.close()

    async def take(self, reader: StreamReader) -> None:
        """Read one request."""
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        self.heads.append(head)
        self.bodies.append(await reader.readexactly(int(length[1])) if length else b"")
        self.asked.release()


def answering(*answers: bytes) -> Script:
    """Answer one request after the other, the last answer again and again."""

    async def script(server: Server, reader: StreamReader, writer: StreamWriter) -> None:
        for answer in answers:
            await server.take(reader)
            writer.write(answer)
        while True:
            await server.take(reader)
            writer.write(answers[-1])

    return script


def once(answer: bytes) -> Script:
    """Answer one request and close."""

    async def script(server: Server, reader: StreamReader, writer: StreamWriter) -> None:
        await server.take(reader)
        writer.write(answer)
        await writer.drain()

    return script


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    served = Server()
    listener = await asyncio.start_server(served.serve, "127.0.0.1", 0)
    served.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    async with asyncio.timeout(PATIENCE_SECONDS):
        yield served
    listener.close()


@pytest.fixture
async def client() -> AsyncIterator[HttpClient]:
    made = make()
    yield made
    made.close()


def make(*, keep_seconds: float = 60.0, connect_seconds: float = 5.0) -> HttpClient:
    return HttpClient(
        connect_seconds=connect_seconds,
        keep_seconds=keep_seconds,
        prepare=lambda made: None,
        headers={"User-Agent": "x"},
    )


async def whole(response: Response) -> bytes:
    chunks = []
    while chunk := await response.chunk():
        chunks.append(chunk)
    return b"".join(chunks)


async def addresses(host: str, port: int) -> tuple[float, list[Any]]:
    """What a client keeps of a name that has this address."""
    loop = asyncio.get_running_loop()
    return loop.time() + 60, await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)


async def ask(client: HttpClient, url: str, body: bytes = b"{}") -> bytes:
    return await whole(await client.request("POST", url, {"a": "b"}, body))


async def test_a_request_has_what_it_needs_and_nothing_else(server: Server, client: HttpClient) -> None:
    assert await ask(client, f"{server.url}/v1/é?a=b c", b"{}") == b"hi"
    await whole(await client.request("GET", server.url, {}))
    host = server.url.removeprefix("http://").encode()
    assert server.heads == [
        b"POST /v1/%C3%A9?a=b%20c HTTP/1.1\r\nHost: "
        + host
        + b"\r\nUser-Agent: x\r\na: b\r\ncontent-length: 2\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: " + host + b"\r\nUser-Agent: x\r\n\r\n",
    ]
    assert server.connections == 1


@pytest.mark.parametrize("value", ["a\r\nb: c", "a\nb", "a\rb", "a\0b"])
async def test_a_header_can_bring_in_no_other_one(server: Server, client: HttpClient, value: str) -> None:
    with pytest.raises(ValueError, match="doesn't allow"):
        await client.request("POST", server.url, {"x": value}, b"")
    assert not server.connections


@pytest.mark.parametrize(
    ("answer", "status", "body", "is_kept"),
    [
        (OK, 200, b"hi", True),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;x=y\r\na\r\n2\r\nbc\r\n0\r\nx: trailer\r\n\r\n",
            200,
            b"abc",
            True,
        ),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b"", True),
        (b"HTTP/1.1 304 Not Modified\r\n\r\n", 304, b"", True),
        (b"HTTP/1.1 500 \r\ncontent-length: 0\r\n\r\n", 500, b"", True),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + OK, 200, b"hi", True),
        (
            b"HTTP/1.1 200 OK\r\nUpgrade: h2c\r\nConnection: Upgrade, Keep-Alive\r\ncontent-length: 2\r\n\r\nhi",
            200,
            b"hi",
            True,
        ),
        (b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nhi", 200, b"hi", False),
        (b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nhi", 200, b"hi", False),
        (b"HTTP/1.0 200 OK\r\n\r\nup to the end", 200, b"up to the end", False),
        (b"HTTP/1.1 200 OK\r\n\r\nup to the end", 200, b"up to the end", False),
    ],
)
async def test_responses_of_every_shape_are_read(
    server: Server, client: HttpClient, answer: bytes, status: int, body: bytes, is_kept: bool
) -> None:
    server.script = answering(answer) if is_kept else once(answer)
    for turn in (1, 2):
        response = await client.request("POST", server.url, {}, b"")
        assert (response.status, await whole(response)) == (status, body)
        assert server.connections == (1 if is_kept else turn)


async def test_a_response_that_comes_byte_by_byte_is_the_same(server: Server, client: HttpClient) -> None:
    answer = b"HTTP/1.1 200 OK\r\nA: 1\r\na: 2\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n2\r\nbc\r\n0\r\n\r\n"

    async def script(server: Server, reader: StreamReader, writer: StreamWriter) -> None:
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(2):
            await server.take(reader)
            for byte in answer:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0)

    server.script = script
    for _ in range(2):
        response = await client.request("POST", server.url, {}, b"")
        assert response.headers == {"a": "1, 2", "transfer-encoding": "chunked"}
        assert await whole(response) == b"abc"
    assert server.connections == 1


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999999999999\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\nxx",
        b"HTTP/1.1 200 OK\r\nx: " + b"a" * (MAX_HEAD_BYTES + 1),
        b"HTTP/1.1 200 OK\r\n" + b"x: a\r\n" * MAX_HEAD_BYTES,
        b"HTTP/1.1 200 OK\r\na\x00b: c\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\nx: " + b"a" * (MAX_HEAD_BYTES + 1),
    ],
    ids=range(10),
)
async def test_what_is_not_http_ends_the_call(server: Server, client: HttpClient, answer: bytes) -> None:
    server.script = answering(answer)
    with pytest.raises(NotHttpError):
        await client.request("POST", server.url, {}, b"")
    server.script = answering(OK)
    assert await ask(client, server.url) == b"hi"


@pytest.mark.parametrize("rest", [b"zz\r\n", b"1;" + b"x" * (1 << 20), b"0\r\nx: " + b"a" * (1 << 20)], ids=range(3))
async def test_a_body_that_is_not_http_ends_where_it_is_not(server: Server, client: HttpClient, rest: bytes) -> None:
    server.script = answering(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n" + rest)
    response = await client.request("POST", server.url, {}, b"")
    with pytest.raises(NotHttpError):
        await whole(response)
    server.script = answering(OK)
    assert await ask(client, server.url) == b"hi"


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nhi",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked \r\n\r\n2\r\nhi\r\n",
    ],
)
async def test_a_response_that_is_cut_off_is_not_taken_for_whole(
    server: Server, client: HttpClient, answer: bytes
) -> None:
    server.script = once(answer)
    response = await client.request("POST", server.url, {}, b"")
    with pytest.raises(ConnectionError):
        await whole(response)


async def test_a_second_response_that_nobody_asked_for_reaches_nobody(server: Server, client: HttpClient) -> None:
    server.script = answering(OK + b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil")
    assert [await ask(client, server.url) for _ in range(3)] == [b"hi"] * 3
    assert server.connections == 3


async def test_what_comes_on_an_unused_connection_reaches_nobody(server: Server, client: HttpClient) -> None:
    sent = asyncio.Event()

    async def script(server: Server, reader: StreamReader, writer: StreamWriter) -> None:
        await server.take(reader)
        writer.write(OK)
        await sent.wait()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil")
        await reader.readexactly(1)

    server.script = script
    assert await ask(client, server.url) == b"hi"
    sent.set()
    await server.ended.acquire()
    server.script = answering(OK)
    assert await ask(client, server.url) == b"hi"


async def test_connections_are_used_again_and_closed_when_unused(server: Server) -> None:
    client = make(keep_seconds=0.05)
    assert [await ask(client, server.url) for _ in range(5)] == [b"hi"] * 5
    await server.ended.acquire()
    assert await ask(client, server.url) == b"hi"
    assert server.connections == 2
    client.close()
    await server.ended.acquire()


async def test_calls_at_the_same_time_have_connections_of_their_own(server: Server, client: HttpClient) -> None:
    go = asyncio.Event()

    async def script(server: Server, reader: StreamReader, writer: StreamWriter) -> None:
        while True:
            await server.take(reader)
            await go.wait()
            body = server.bodies[-1]
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))

    server.script = script
    calls = [asyncio.create_task(ask(client, server.url, b"x" * n)) for n in range(8)]
    for _ in calls:
        await server.asked.acquire()
    go.set()
    await asyncio.gather(*calls)
    assert await ask(client, server.url, b"yy") == b"yy"
    assert server.connections == 8


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_only_a_question_is_asked_again_when_a_kept_connection_is_closed(
    server: Server, client: HttpClient, method: str
) -> None:
    async def script(server: Server, reader: StreamReader, writer: StreamWriter) -> None:
        await server.take(reader)
        writer.write(OK)
        await server.take(reader)  # and closes, as if it had come too late

    server.script = script
    await whole(await client.request(method, server.url, {}))
    if method == "GET":
        assert await whole(await client.request(method, server.url, {})) == b"hi"
    else:
        with pytest.raises(ConnectionResetError):
            await client.request(method, server.url, {})
    assert server.connections == (2 if method == "GET" else 1)


async def test_a_connection_that_the_server_is_closing_is_not_used_again(server: Server, client: HttpClient) -> None:
    server.script = once(OK)
    assert await ask(client, server.url) == b"hi"
    (connection,) = client._free[client_module._target(server.url).server]
    while not connection._transport.is_closing():  # noqa: ASYNC110
        await asyncio.sleep(0)  # nothing tells it before the loop does
    assert await ask(client, server.url) == b"hi"
    assert server.connections == 2


@pytest.mark.parametrize("arrives", [b"", b"HTTP/1.1 200", b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nhi"])
async def test_a_call_that_is_cancelled_breaks_its_connection_off(
    server: Server, client: HttpClient, arrives: bytes
) -> None:
    asked = asyncio.Event()

    async def script(server: Server, reader: StreamReader, writer: StreamWriter) -> None:
        await server.take(reader)
        writer.write(arrives)
        asked.set()
        await reader.readexactly(1)

    server.script = script
    call = asyncio.create_task(ask(client, server.url))
    await asked.wait()
    call.cancel()
    if arrives.endswith(b"hi"):  # whoever has the response must close it
        (await client.request("POST", server.url, {}, b"")).close()
    await server.ended.acquire()
    server.script = answering(OK)
    assert await ask(client, server.url) == b"hi"


async def test_a_call_that_is_cancelled_when_its_response_has_come_leaves_the_next_one_alone(
    server: Server, client: HttpClient
) -> None:
    """The connection is free, and another call may have taken it, before the first one has noticed."""
    for _ in range(200):
        first = asyncio.create_task(client.request("POST", server.url, {}, b"1"))
        while not client._free.get(client_module._target(server.url).server):  # noqa: ASYNC110
            await asyncio.sleep(
                0
            )  # until the response has come whole, which nothing else tells before the first call goes on
        second = asyncio.create_task(ask(client, server.url, b"2"))
        await asyncio.sleep(0)
        first.cancel()
        assert await second == b"hi"
        await asyncio.gather(first, return_exceptions=True)


@pytest.mark.parametrize("is_at_once", [True, False])
async def test_a_call_that_is_cancelled_just_when_its_response_begins_breaks_its_connection_off(
    client: HttpClient, is_at_once: bool
) -> None:
    """Before the call has noticed, the head comes: on asyncio's loop in one of the two cases, on uvloop in the other."""
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        call = asyncio.create_task(client.request("POST", "http://{}:{}".format(*listener.getsockname()), {}, b""))
        accepted, _ = await loop.sock_accept(listener)
    with accepted:
        await loop.sock_recv(accepted, 1 << 16)
        accepted.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        if is_at_once:
            call.cancel()
        else:
            loop.call_soon(call.cancel)
        with pytest.raises(asyncio.CancelledError):
            await call
        async with asyncio.timeout(PATIENCE_SECONDS):
            with contextlib.suppress(ConnectionError):
                assert await loop.sock_recv(accepted, 1) == b""


@pytest.mark.parametrize("greeting", [b"SSH-2.0-OpenSSH_9.6\r\n", b""], ids=["speaks", "closes"])
async def test_a_server_that_does_not_wait_for_a_request_ends_the_call(
    server: Server, client: HttpClient, greeting: bytes
) -> None:
    async def script(server: Server, reader: StreamReader, writer: StreamWriter) -> None:
        writer.write(greeting)
        if greeting:
            await reader.read()

    server.script = script
    calls = [client.request("POST", server.url, {}, b"") for _ in range(50)]
    async with asyncio.timeout(PATIENCE_SECONDS):
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} <= ({NotHttpError} if greeting else {ConnectionResetError})
    assert not client._all


async def test_a_body_that_nobody_reads_pauses_the_connection(server: Server, client: HttpClient) -> None:
    size = 64 << 20
    sent = 0

    async def script(server: Server, reader: StreamReader, writer: StreamWriter) -> None:
        nonlocal sent
        await server.take(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
        for _ in range(size >> 20):
            writer.write(bytes(1 << 20))
            await writer.drain()
            sent += 1 << 20
        await server.take(reader)
        writer.write(OK)

    server.script = script
    response = await client.request("POST", server.url, {}, b"")
    before = -1
    while before != sent:  # until nothing goes on
        before = sent
        await asyncio.sleep(0.2)
    assert sent < size / 2
    assert len(await whole(response)) == size
    assert await ask(client, server.url) == b"hi"
    assert server.connections == 1


async def test_a_large_body_is_sent_whole_and_only_as_fast_as_it_is_read(server: Server, client: HttpClient) -> None:
    body = bytes(range(256)) * (1 << 17)
    assert await ask(client, server.url, body) == b"hi"
    assert server.bodies == [body]


async def test_a_server_may_answer_before_it_has_the_body(server: Server, client: HttpClient) -> None:
    async def script(server: Server, reader: StreamReader, writer: StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\ncontent-length: 2\r\n\r\nno")
        await asyncio.Event().wait()

    server.script = script
    response = await client.request("POST", server.url, {}, bytes(64 << 20))
    assert (response.status, await whole(response)) == (413, b"no")
    server.script = answering(OK)
    assert await ask(client, server.url) == b"hi"


async def test_a_connection_with_a_request_that_was_answered_but_is_not_sent_is_not_used_again(
    server: Server, client: HttpClient
) -> None:
    async def script(server: Server, reader: StreamReader, writer: StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\ncontent-length: 2\r\n\r\nno")
        await asyncio.Event().wait()

    client._prepare = lambda made: made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with socket.create_server(("127.0.0.1", 0)) as narrow:
        narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listener = await asyncio.start_server(server.serve, sock=narrow, limit=1024)
        server.script = script
        async with asyncio.timeout(PATIENCE_SECONDS):
            for _ in range(2):
                assert await ask(client, "http://{}:{}".format(*narrow.getsockname()), bytes(200_000)) == b"no"
        assert server.connections == 2
        listener.close()


async def test_a_server_that_goes_in_the_middle_of_a_body_ends_the_call(server: Server, client: HttpClient) -> None:
    async def script(server: Server, reader: StreamReader, writer: StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")

    server.script = script
    with pytest.raises(ConnectionError):
        await client.request("POST", server.url, {}, bytes(64 << 20))


async def test_what_keeps_a_connection_from_being_made_is_told(client: HttpClient) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(NoConnectionError) as refused:
        await client.request("GET", f"http://127.0.0.1:{port}/", {})
    assert isinstance(refused.value.__cause__, ConnectionRefusedError)
    with pytest.raises(NoConnectionError) as unknown:
        await client.request("GET", "http://nowhere.invalid/", {})
    assert isinstance(unknown.value.__cause__, socket.gaierror)
    for host in ("a..b", "ü..b", "ü" * 64):
        with pytest.raises(NoConnectionError) as impossible:
            await client.request("GET", f"http://{host}/", {})
        assert isinstance(impossible.value.__cause__, UnicodeError)


async def test_a_connection_is_made_in_time_or_not_at_all() -> None:
    client = make(connect_seconds=0.05)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        filling = [socket.socket() for _ in range(8)]
        for one in filling:
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        with pytest.raises(NoConnectionError) as late:
            await client.request("GET", "http://{}:{}/".format(*full.getsockname()), {})
        for one in filling:
            one.close()
    assert isinstance(late.value.__cause__, TimeoutError)
    client.close()


async def test_a_name_is_looked_up_again_after_a_while(
    server: Server, client: HttpClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server.url.replace("127.0.0.1", "localhost")
    loop = asyncio.get_running_loop()
    looked_up = 0
    found = await loop.getaddrinfo("127.0.0.1", int(server.url.rpartition(":")[2]), type=socket.SOCK_STREAM)

    async def getaddrinfo(host: str, *_: object, **__: object) -> object:
        nonlocal looked_up
        looked_up += host == "localhost"  # uvloop asks about addresses too
        return found

    monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)
    server.script = once(OK.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))
    for _ in range(3):
        await ask(client, url)
    assert (looked_up, server.connections) == (1, 3)
    monkeypatch.setattr(client_module, "_LOOKUP_SECONDS", -1.0)
    client._addresses.clear()
    for _ in range(2):
        await ask(client, url)
    assert looked_up == 3


async def test_a_second_address_is_tried_when_the_first_takes_no_connections(
    server: Server, client: HttpClient
) -> None:
    port = int(server.url.rpartition(":")[2])
    until, found = await addresses("127.0.0.2", port)
    client._addresses["both", port] = (until, found + (await addresses("127.0.0.1", port))[1])
    assert await ask(client, f"http://both:{port}") == b"hi"


@pytest.mark.parametrize("kind", ["good", "expired", "other_host", "self_signed"])
async def test_https_needs_a_certificate_that_is_trusted(
    server: Server, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(CERTIFICATES / f"{kind}.pem", CERTIFICATES / "key.pem")
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0, ssl=context)
    port = listener.sockets[0].getsockname()[1]
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATES / "authority.pem"))
    client = make()
    for name in ("images.example", "images.example."):
        client._addresses[name, port] = await addresses("127.0.0.1", port)
    body = bytes(8 << 20)
    url = f"https://images.example:{port}"
    if kind == "good":
        assert [await ask(client, url, body) for _ in range(2)] == [b"hi"] * 2
        assert await ask(client, f"https://images.example.:{port}") == b"hi"  # a name with all its parts
        assert (server.bodies, server.connections) == ([body, body, b"{}"], 2)
    else:
        with pytest.raises(NoConnectionError) as refused:
            await ask(client, url, body)
        assert isinstance(refused.value.__cause__, ssl.SSLCertVerificationError)
        assert not server.bodies
    client.close()
    listener.close()


async def test_authorities_that_were_replaced_are_read_again_when_a_certificate_is_not_trusted(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(CERTIFICATES / "good.pem", CERTIFICATES / "key.pem")
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0, ssl=context)
    port = listener.sockets[0].getsockname()[1]
    trusted = tmp_path / "authorities.pem"
    trusted.write_bytes((CERTIFICATES / "self_signed.pem").read_bytes())
    monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
    monkeypatch.setattr(trust, "_KEPT_SECONDS", 0.0)
    client = make()
    client._addresses["images.example", port] = await addresses("127.0.0.1", port)
    with pytest.raises(NoConnectionError):
        await ask(client, f"https://images.example:{port}")
    trusted.write_bytes((CERTIFICATES / "authority.pem").read_bytes())
    assert await ask(client, f"https://images.example:{port}") == b"hi"
    client.close()
    listener.close()
