"""A server on a real socket in a thread of this process, and a plain HTTP client."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import openai
import uvicorn
from starlette.types import ASGIApp

from chiasm.http.config import HttpConfig
from chiasm.http.connection import Connection
from chiasm.http.connections import Connections
from chiasm.http.limits import Refusals
from chiasm.http.listen import bind, url_of


@contextlib.contextmanager
def serving(app: ASGIApp) -> Iterator[str]:
    """Serve ``app`` on a free port and yield the base URL."""
    listener = bind("127.0.0.1", 0)
    protocol = partial(Connection, Connections(HttpConfig(), Refusals()))
    config = uvicorn.Config(
        app,
        lifespan="on",
        log_config=None,  # any other would change loggers of the whole process
        timeout_graceful_shutdown=1,
        timeout_keep_alive=75,  # as chiasm's own: longer than clients keep idle connections, so none meets a closed one
        http=protocol,  # type: ignore[arg-type]
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield url_of(listener)
    finally:
        server.should_exit = True
        thread.join()


@dataclass
class Listening:
    """Where the endpoints of a server are, and a client of it."""

    url: str

    @property
    def chat(self) -> str:
        return f"{self.url}/v1/chat/completions"

    @property
    def completions(self) -> str:
        return f"{self.url}/v1/completions"

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)


@dataclass
class Reply:
    """A whole response."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        return self.json["error"]

    @property
    def events(self) -> list[Any]:
        """The data of the stream's events: JSON, or ``"[DONE]"``."""
        data = [line[6:] for line in self.body.decode().split("\n") if line.startswith("data: ")]
        return [line if line == "[DONE]" else json.loads(line) for line in data]

    @property
    def comments(self) -> list[str]:
        return [line[2:] for line in self.body.decode().split("\n") if line.startswith(": ")]

    @property
    def timing(self) -> dict[str, float | None]:
        """Durations of the Server-Timing header in milliseconds."""
        return parse_timing(self.headers["server-timing"])


def parse_timing(header: str) -> dict[str, float | None]:
    entries: dict[str, float | None] = {}
    for entry in header.split(", "):
        name, *parameters = entry.split(";")
        values = dict(parameter.split("=") for parameter in parameters)
        entries[name] = float(values["dur"]) if "dur" in values else None
    return entries


def request(method: str, url: str, body: object = None, headers: Mapping[str, str] | None = None) -> Reply:
    """Send a request on a connection of its own; a body that isn't bytes is sent as JSON."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=120)
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    try:
        connection.request(method, parts.path, data, dict(headers or {}))
        response = connection.getresponse()
        names = {name.lower(): value for name, value in response.getheaders()}
        return Reply(response.status, names, response.read())
    finally:
        connection.close()


def post(url: str, body: object, headers: Mapping[str, str] | None = None) -> Reply:
    return request("POST", url, body, headers)


def get(url: str) -> Reply:
    return request("GET", url)


def begun(url: str, body: object, *, stands_still: bool = False) -> http.client.HTTPResponse:
    """Post a request whose answer is a stream, and return when it has begun. Closing the response ends the connection.

    ``stands_still``: a stream of 300 kB is under way until it is read. The server has to wait for its client, because the
    systems hold less than that for a connection with such a small window and such small segments.
    """
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc)
    with socket.socket() as connection.sock:  # open as long as the response is
        connection.sock.settimeout(120)
        if stands_still:
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1400)
        connection.sock.connect((parts.hostname, parts.port))
        connection.request("POST", parts.path, json.dumps(body))
        response = connection.getresponse()
    assert response.readline().startswith(b"data: ")
    return response


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until the condition holds. It must make an HTTP request, so that the loop doesn't spin."""
    give_up = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < give_up
