"""Ports for processes that are started with a number."""

from __future__ import annotations

import contextlib
import random
import socket
from pathlib import Path

_PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""The range from which the system takes ports for outgoing connections, and for those who bind port 0."""
_PORTS = 10_000
_given: set[int] = set()


def free_port() -> int:
    """Return a port that the system gives to nobody else before a process listens on it, which may take half a minute."""
    first = int(_PORT_RANGE.read_text().split()[0])
    while True:
        port = random.randrange(first - _PORTS, first)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in _given:
                _given.add(port)
                return port
