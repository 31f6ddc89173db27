"""Connections to hosts that vanish without a word: the kernel breaks them."""

from __future__ import annotations

import socket

_PROBES = 3


def break_if_vanished(connection: socket.socket, seconds: float) -> None:
    """Have a TCP connection break when the other host has answered nothing for this long, whether something was sent or not.

    While nothing is sent, the kernel asks (keepalive). What was sent and not confirmed it repeats instead, by itself for a
    quarter of an hour (``TCP_USER_TIMEOUT``, on Linux). Raises OSError if the connection is broken already.
    """
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {
        "TCP_KEEPIDLE": max(1, round(seconds * 2 / 5)),
        "TCP_KEEPINTVL": max(1, round(seconds / 5)),
        "TCP_KEEPCNT": _PROBES,
        "TCP_USER_TIMEOUT": round(seconds * 1000),
    }
    for name, value in options.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
