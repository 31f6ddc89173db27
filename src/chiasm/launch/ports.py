"""Ports that are ours from before a child starts until after it has ended."""

from __future__ import annotations

import errno
import socket
import sys

from chiasm.errors import ConfigurationError


class HeldPort:
    """A port that nobody else gets, while a child of this process may listen on it.

    On Linux a socket that is bound but does not listen keeps a port from everyone but those who bind with SO_REUSEADDR,
    as servers do. Elsewhere that would keep the child away too, so there the port is only tried and let go.
    """

    def __init__(self, host: str, port: int = 0) -> None:
        """Take ``port``, or a free one for 0. Raises ConfigurationError when it is in use or cannot be bound."""
        self.host = host
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
                0
            ]
        except (OSError, OverflowError) as error:
            raise ConfigurationError(f"cannot listen on {host!r} port {port}: {error}") from error
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind(address)
        except (OSError, OverflowError) as error:
            self._socket.close()
            if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
                raise ConfigurationError(
                    f"port {port} on {host} is in use; stop what uses it, or choose another port with --port"
                ) from error
            raise ConfigurationError(f"cannot listen on {host} port {port}: {error}") from error
        self.port: int = self._socket.getsockname()[1]
        if sys.platform != "linux":
            self._socket.close()

    @property
    def url(self) -> str:
        """``http://host:port``."""
        return _url(self.host, self.port)

    @property
    def local_url(self) -> str:
        """The same for a client on this machine: where all addresses are listened on, loopback is one of them."""
        return _url({"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(self.host, self.host), self.port)

    def release(self) -> None:
        """Let the port go; idempotent."""
        self._socket.close()


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
