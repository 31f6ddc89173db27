"""Ports for processes that are started with a number."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack
from pathlib import Path

_PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""The range from which the system takes ports for outgoing connections, and for those who bind port 0."""
_PORTS = 10_000
_given: dict[int, socket.socket] = {}
"""Each with what tells other processes of this machine's tests that it is given, as long as this one runs."""


def free_port() -> int:
    """Return a port that nobody else is given before a process listens on it, which may take half a minute."""
    return free_ports(1)


def free_ports(count: int) -> int:
    """Return the first of so many of them in a row."""
    end = int(_PORT_RANGE.read_text().split()[0])
    while True:
        first = random.randrange(end - _PORTS, end - count + 1)
        with ExitStack() as signs:
            try:
                taken = {port: signs.enter_context(_sign_of(port)) for port in range(first, first + count)}
            except OSError:
                continue
            signs.pop_all()
        _given.update(taken)
        return first


def _sign_of(port: int) -> socket.socket:
    """Tell others that a port is given. Raises OSError if it is given already, or somebody listens there."""
    sign = socket.socket(socket.AF_UNIX)
    try:
        sign.bind(f"\0chiasm-test-port-{port}")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
    except OSError:
        sign.close()
        raise
    return sign
