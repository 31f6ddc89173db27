"""Ports that stay reserved from before a child starts until after it has ended, and the health of what listens there."""

from __future__ import annotations

import http.client
import ssl
import sys
import urllib.request

import msgspec

from chiasm.http.listen import base_url, bind
from chiasm.prometheus import read_samples, total
from chiasm.wire import UNREADABLE, Health, InstanceInfo, ProxyHealth

_LOOPBACK_OF = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}
_HEALTH_SECONDS = 2.0
_PROGRESS_SECONDS = 0.2
_Response = http.client.HTTPResponse


class _AnyStatus(urllib.request.HTTPErrorProcessor):
    """Takes an answer with whatever status: as an exception, it would be read where a second one isn't caught."""

    def http_response(self, request: urllib.request.Request, response: _Response) -> _Response:
        return response

    https_response = http_response


_OPENER = urllib.request.build_opener(
    _AnyStatus,
    urllib.request.ProxyHandler({}),  # HTTP_PROXY is not for this machine
    urllib.request.HTTPSHandler(context=ssl._create_unverified_context()),  # a certificate names the machine otherwise
)


class HeldPort:
    """A port that nobody else can take, while a child of this process may listen on it.

    On Linux a socket that is bound but doesn't listen keeps a port from everyone except those who bind with SO_REUSEADDR,
    as servers do. Elsewhere that would keep the child away too, so there the port is only tried and released.
    """

    def __init__(self, host: str, port: int = 0, *, scheme: str = "http") -> None:
        """Take ``port``, or a free one for 0. Raises ConfigurationError if it is in use or cannot be bound.

        ``scheme`` is what will be spoken there.
        """
        self.host = host
        self._scheme = scheme
        self._socket = bind(host, port, listening=False)
        self.port: int = self._socket.getsockname()[1]
        if sys.platform != "linux":
            self._socket.close()

    @property
    def url(self) -> str:
        """The base URL at which clients reach it."""
        return base_url(self.host, self.port, self._scheme)

    @property
    def local_url(self) -> str:
        """The base URL for a client on this machine: loopback, where the server listens on all addresses."""
        return base_url(_LOOPBACK_OF.get(self.host, self.host), self.port, self._scheme)

    def release(self) -> None:
        """Release the port; idempotent."""
        self._socket.close()


def check_port(host: str, port: int) -> None:
    """Raise ConfigurationError if ``port`` cannot be listened on."""
    HeldPort(host, port).release()


def is_healthy(url: str) -> bool:
    """Return whether GET /health at base URL ``url`` is answered with 200."""
    status, _ = _get_health(url)
    return status == 200


def instance_infos(url: str, key: str | None = None) -> dict[str, InstanceInfo]:
    """Return what the proxy at ``url`` says of each instance, by the instance's URL; empty if it doesn't answer."""
    _, body = _get_health(url, key=key)
    try:
        return {instance.url: instance for instance in msgspec.json.decode(body, type=ProxyHealth).instances}
    except UNREADABLE:
        return {}


def read_metric(url: str, name: str, key: str | None = None, **labels: str) -> float | None:
    """Return the sum of the samples of a metric of the server at ``url`` that have these labels; None if it tells none."""
    _, body = _get(f"{url}/metrics", _HEALTH_SECONDS, key=key)
    lines = (line for line in body.decode(errors="replace").split("\n") if line.startswith(name))
    return total(read_samples("\n".join(lines)), name, **labels)


def load_progress(url: str) -> str:
    """Return in words how far the instance at ``url`` is with loading its model; empty if it doesn't say."""
    status, body = _get_health(url, _PROGRESS_SECONDS)
    try:
        health = msgspec.json.decode(body, type=Health) if status == 503 else Health()
    except UNREADABLE:
        return ""
    return f"{health.loaded_tensors}/{health.tensors} tensors" if health.tensors else ""


def _get_health(url: str, timeout_seconds: float = _HEALTH_SECONDS, *, key: str | None = None) -> tuple[int, bytes]:
    return _get(f"{url}/health", timeout_seconds, key=key)


def _get(url: str, timeout_seconds: float, *, key: str | None) -> tuple[int, bytes]:
    """Return status and body; 0 and nothing if there is no response."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    try:
        with _OPENER.open(urllib.request.Request(url, headers=headers), timeout=timeout_seconds) as response:
            return response.status, response.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
