"""What tests of running instances share: one process to fork them from, and calls as only processes of a fleet make them."""

from __future__ import annotations

from collections.abc import Generator

import httpx2 as httpx

from chiasm.fleet_key import FleetKey
from chiasm.http.fleet_calls import body_digest, signature
from chiasm.launch.fork_server import ForkServer

FORKS = ForkServer()
"""It ends with the test run."""


class Signed(httpx.Auth):
    """Signs each request with a fleet key: ``httpx.post(url, json=body, auth=Signed(deployment.fleet_key))``."""

    requires_request_body = True

    def __init__(self, key: FleetKey) -> None:
        self._key = key

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        request.headers.update(signature(self._key, request.method, request.url.path, body_digest(request.content)))
        yield request
