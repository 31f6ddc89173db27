"""A server that is for its own machine refuses web pages of other sites, and nobody else."""

from __future__ import annotations

import pytest

from chiasm.errors import Code
from chiasm.http.config import HttpConfig
from tests.http.serving import site
from tests.http.test_endpoint import echo, error_of
from tests.http.test_front import CHAT, ORIGIN, send

REBOUND = {"host": "evil.example:8000", "origin": "http://evil.example:8000"}
"""A page whose name leads here by now; for the browser it is of the same origin."""
CROSS_SITE = {"origin": ORIGIN, "sec_fetch_site": "cross-site"}
PROXIED = {"host": "chat.example", "origin": "https://chat.example", "sec_fetch_site": "same-origin"}
"""A page behind a reverse proxy that passes on the name that the browser asked for."""


@pytest.mark.parametrize("headers", [REBOUND, CROSS_SITE, PROXIED], ids=["rebound", "cross-site", "unknown name"])
@pytest.mark.parametrize("path", [CHAT, "/none"])
def test_a_page_of_another_site_is_refused_before_its_body_is_read(headers: dict[str, str], path: str) -> None:
    with site(echo, is_local=True) as server:
        response = send(server.url + path, content=b"x", **headers)
    assert response.status_code == 403
    assert error_of(response)["code"] == Code.ORIGIN_NOT_ALLOWED
    assert response.headers["x-request-id"]
    assert server.ended == []


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"host": "box.example"},
        {"host": "box.example", "x_forwarded_for": "192.0.2.1"},
        {"host": "box.example", "sec_fetch_site": "none"},
        {"host": "localhost:8000", "origin": "http://localhost:8000", "sec_fetch_site": "same-origin"},
        {"host": "localhost:8000", "origin": "http://localhost:3000", "sec_fetch_site": "same-site"},
        {"host": "app.localhost", "origin": "http://app.localhost"},
        {"host": "127.0.0.1:8000", "origin": "http://127.0.0.1:8000"},
        {"host": "[::1]:8000", "origin": "http://[::1]:8000"},
        {"host": "127.0.0.1:8000", "origin": "https://chat.example", "sec_fetch_site": "same-origin"},
    ],
)
def test_clients_reverse_proxies_and_pages_of_this_machine_are_answered(headers: dict[str, str]) -> None:
    with site(echo, is_local=True) as server:
        assert send(server.url + CHAT, content=b"x", **headers).content == b"x"


@pytest.mark.parametrize(
    ("config", "headers"),
    [
        (HttpConfig(allowed_hosts=("Chat.example",)), PROXIED),
        (HttpConfig(allowed_hosts=("*",)), PROXIED),
        (HttpConfig(allowed_origins=("https://chat.example",)), PROXIED),
        (HttpConfig(allowed_origins=(ORIGIN,)), CROSS_SITE),
        (HttpConfig(allowed_origins=("*",)), CROSS_SITE),
    ],
)
def test_options_let_pages_in(config: HttpConfig, headers: dict[str, str]) -> None:
    with site(echo, is_local=True, config=config) as server:
        assert send(server.url + CHAT, content=b"x", **headers).content == b"x"


def test_a_server_that_others_reach_anyway_refuses_none_of_them() -> None:
    with site(echo) as server:
        for headers in (REBOUND, CROSS_SITE, PROXIED):
            assert send(server.url + CHAT, content=b"x", **headers).content == b"x"
