"""Connections to hosts that vanish without a word."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from chiasm.http.vanished import break_if_vanished
from tests.hosts import Host, Network


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    with Network(2) as hosts:
        yield hosts


@pytest.mark.parametrize("is_sent", [False, True], ids=["nothing was sent", "something was sent"])
def test_a_connection_to_a_host_that_vanished_breaks(hosts: list[Host], is_sent: bool) -> None:
    here, there = hosts
    with there.inside():
        listener = socket.create_server((there.address, 0))
    with here.inside():
        connection = socket.create_connection(listener.getsockname())
    with listener, listener.accept()[0], connection:
        break_if_vanished(connection, 1.0)
        there.unplug()
        if is_sent:
            connection.sendall(b"?")
        connection.settimeout(30.0)
        with pytest.raises(OSError, match=r"\[Errno"):  # the kernel's, not the time limit of this test
            connection.recv(1)
