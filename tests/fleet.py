"""What tests of running instances share: one process to fork them from, and calls as only processes of a fleet make them."""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterator
from contextlib import contextmanager

import httpx2 as httpx
import psutil

from chiasm.fleet_key import FleetKey
from chiasm.http.fleet_calls import body_digest, signature
from chiasm.launch.fork_server import COMMAND, ForkServer
from tests.launch.waiting import command_line

FORKS = ForkServer()
"""It ends with the test run."""


def fork_servers() -> list[psutil.Process]:
    """What forks for this process."""
    return [one for one in psutil.Process().children() if command_line(one)[-1:] == [COMMAND]]


@contextmanager
def no_forks() -> Iterator[None]:
    """What forks instances stands still meanwhile, so that none that is killed comes back."""
    servers = fork_servers()
    assert servers
    for server in servers:
        server.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for server in servers:
            server.send_signal(signal.SIGCONT)


class Signed(httpx.Auth):
    """Signs each request with a fleet key: ``httpx.post(url, json=body, auth=Signed(deployment.fleet_key))``."""

    requires_request_body = True

    def __init__(self, key: FleetKey) -> None:
        self._key = key

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        request.headers.update(signature(self._key, request.method, request.url.path, body_digest(request.content)))
        yield request
