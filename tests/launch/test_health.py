"""Reading what a proxy says of its instances."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator

import pytest

from chiasm.launch import health
from chiasm.launch.ports import HeldPort

ANSWERS = {
    "/good/health": (200, b'{"instances": [{"url": "http://e", "state": "healthy"}]}'),
    "/partly/health": (503, b'{"instances": [{"url": "http://e", "state": "starting"}]}'),
    "/strange/health": (200, b"[1]"),
    "/broken/health": (200, b"{"),
}


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status, body = ANSWERS[self.path]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
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


def test_each_instance_has_its_state(url: str) -> None:
    assert health.states(f"{url}/good") == {"http://e": "healthy"}


def test_a_proxy_that_cannot_answer_requests_still_tells_states(url: str) -> None:
    assert health.states(f"{url}/partly") == {"http://e": "starting"}


@pytest.mark.parametrize("path", ["strange", "broken"])
def test_an_answer_that_is_not_understood_tells_nothing(url: str, path: str) -> None:
    assert health.states(f"{url}/{path}") == {}


def test_one_that_does_not_listen_tells_nothing() -> None:
    held = HeldPort("127.0.0.1")
    assert health.states(held.url) == {}
    held.release()
