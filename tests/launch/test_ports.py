"""Ports are held for a child, and for nobody else."""

from __future__ import annotations

import socket

import pytest

from chiasm.errors import ConfigurationError
from chiasm.launch.ports import HeldPort


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


def test_nobody_else_is_given_a_held_port() -> None:
    held = HeldPort("127.0.0.1")
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", held.port))
    held.release()


def test_a_port_in_use_is_named_in_the_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConfigurationError, match=rf"port {port} on 127\.0\.0\.1 is in use.*--port"):
            HeldPort("127.0.0.1", port)


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host"])
def test_an_address_that_is_not_this_machines_is_refused(host: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot listen on"):
        HeldPort(host)


def test_all_addresses_are_reached_through_loopback() -> None:
    held = HeldPort("0.0.0.0")
    assert held.url == f"http://0.0.0.0:{held.port}"
    assert held.local_url == f"http://127.0.0.1:{held.port}"
    held.release()
