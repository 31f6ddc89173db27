"""Ports are held for a child and for nobody else, and what listens there is asked for its health."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Iterator

import pytest

from chiasm.errors import ConfigurationError
from chiasm.launch.ports import HeldPort, instance_infos
from tests.launch.waiting import eventually

ANSWERS = {
    "/good/health": (200, b'{"instances": [{"url": "http://e", "state": "healthy"}]}'),
    "/partly/health": (503, b'{"instances": [{"url": "http://e", "state": "starting"}]}'),
    "/strange/health": (200, b"[1]"),
    "/broken/health": (200, b"{"),
}
CUT_OFF = "/cut-off/health"
"""An error whose body ends too early, as that of a server that is killed."""


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status, body = ANSWERS.get(self.path, (503, b"{"))
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) + (self.path == CUT_OFF)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_free_port_is_taken_for_0() -> None:
    held = HeldPort("127.0.0.1")
    assert held.url == f"http://127.0.0.1:{held.port}"
    held.release()


def test_a_server_can_listen_on_a_held_port_again_and_again() -> None:
    held = HeldPort("127.0.0.1")
    for _ in range(2):
        with socket.create_server(("127.0.0.1", held.port)), socket.create_connection(("127.0.0.1", held.port)):
            pass
    held.release()


def states(url: str) -> dict[str, str]:
    """The state of each instance of a proxy, by its URL."""
    return {name: instance.state for name, instance in instance_infos(url).items()}


def test_nobody_else_gets_a_held_port() -> None:
    held = HeldPort("127.0.0.1")
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", held.port))
    held.release()


def test_a_port_in_use_is_named_in_the_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConfigurationError, match=rf"Port {port} on 127\.0\.0\.1 is in use.*--port"):
            HeldPort("127.0.0.1", port)


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host"])
def test_an_address_of_another_machine_is_refused(host: str) -> None:
    with pytest.raises(ConfigurationError, match="Cannot listen on"):
        HeldPort(host)


def test_all_addresses_are_reached_through_loopback() -> None:
    held = HeldPort("0.0.0.0")
    assert held.url == f"http://0.0.0.0:{held.port}"
    assert held.local_url == f"http://127.0.0.1:{held.port}"
    held.release()


def test_each_instance_has_its_state(url: str) -> None:
    assert eventually(lambda: states(f"{url}/good") == {"http://e": "healthy"})  # who answers late isn't waited for


def test_a_proxy_that_cannot_answer_requests_still_reports_states(url: str) -> None:
    assert eventually(lambda: states(f"{url}/partly") == {"http://e": "starting"})


@pytest.mark.parametrize("path", ["strange", "broken", "cut-off"])
def test_a_response_that_cannot_be_read_yields_no_states(url: str, path: str) -> None:
    assert states(f"{url}/{path}") == {}


def test_a_proxy_that_does_not_listen_yields_no_states() -> None:
    held = HeldPort("127.0.0.1")
    assert states(held.url) == {}
    held.release()
