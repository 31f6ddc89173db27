"""Ports and URLs."""

from __future__ import annotations

import socket

import pytest

from chiasm.errors import ConfigurationError
from chiasm.http.listen import base_url, bind, check_instance_url, check_url, is_loopback, url_of


def test_a_bound_port_takes_connections_at_once() -> None:
    with bind("127.0.0.1", 0) as listener:
        socket.create_connection(listener.getsockname(), timeout=5).close()


def test_a_port_in_use_is_one_clear_error_that_names_the_option() -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=rf"^Port {port} on 127\.0\.0\.1 is in use; .* with --kv-port\.$"):
            bind("127.0.0.1", port, option="--kv-port")


def test_a_port_that_is_only_held_can_be_listened_on_by_a_child() -> None:
    with bind("127.0.0.1", 0, listening=False) as held:
        bind("127.0.0.1", held.getsockname()[1]).close()


@pytest.mark.parametrize(
    ("host", "port"),
    [
        ("127.0.0.1", 70_000),
        ("127.0.0.1", -1),
        ("no.such.host.invalid", 0),
        ("192.0.2.1", 0),
        ("a" * 300, 0),
        ("\ud800", 0),
    ],
)
def test_an_address_that_cannot_be_bound_is_one_clear_error(host: str, port: int) -> None:
    with pytest.raises(ConfigurationError) as caught:
        bind(host, port)
    assert caught.value.message.endswith(".")


def test_urls_of_addresses() -> None:
    assert base_url("127.0.0.1", 8000) == "http://127.0.0.1:8000"
    assert base_url("::1", 8000) == "http://[::1]:8000"
    with bind("127.0.0.1", 0) as listener:
        assert url_of(listener) == f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_base_url_loses_its_final_slash() -> None:
    assert check_url("https://host.example:8000/") == "https://host.example:8000"


@pytest.mark.parametrize(
    "url", ["", "host:8000", "ftp://host", "http://", "http://host/v1", "http://host:99999", "http://[::1"]
)
def test_anything_else_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="http://host:port"):
        check_url(url)


def test_an_instance_has_no_credentials_in_its_url_and_none_are_shown() -> None:
    assert check_instance_url("http://host:8000/") == "http://host:8000"
    for url in ("http://user:secret@host:8000", "http://secret@host:8000"):
        with pytest.raises(ConfigurationError, match="http://host:port") as refusal:
            check_instance_url(url)
        assert "secret" not in refusal.value.message


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.1", "localhost", "LOCALHOST"])
def test_what_only_its_own_machine_reaches(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "::ffff:10.0.0.1", "localhost.example", ""])
def test_what_others_may_reach(host: str) -> None:
    assert not is_loopback(host)
