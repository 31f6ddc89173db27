"""Ports for processes that are started with a number."""

from __future__ import annotations

import random
import socket
from pathlib import Path

_PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""The range from which the system takes ports for outgoing connections, and for those who bind port 0."""
_PORTS = 10_000
_given: dict[int, socket.socket] = {}
"""Each with what tells other processes of this machine's tests that it is given, as long as this one runs."""


def free_port() -> int:
    """Return a port that nobody else is given before a process listens on it, which may take half a minute."""
    first = int(_PORT_RANGE.read_text().split()[0])
    while True:
        port = random.randrange(first - _PORTS, first)
        sign = socket.socket(socket.AF_UNIX)
        try:
            sign.bind(f"\0chiasm-test-port-{port}")
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
        except OSError:
            sign.close()
            continue
        _given[port] = sign
        return port
