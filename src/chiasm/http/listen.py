"""Ports and base URLs."""

from __future__ import annotations

import errno
import socket
from ipaddress import IPv6Address, ip_address
from urllib.parse import urlsplit

from chiasm.errors import ConfigurationError

BACKLOG = 2048


def bind(host: str, port: int, *, option: str = "--port", listening: bool = True) -> socket.socket:
    """Return a socket bound to this address, listening unless told otherwise. Port 0 takes a free port.

    Raises ConfigurationError; ``option`` is what its message tells a person to change.
    """
    if not 0 <= port < 1 << 16:  # the resolver would take it modulo 2**16
        raise ConfigurationError(f"{port} is not a port; give {option} a number from 0 to 65535.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            if listening:
                listener.listen(BACKLOG)
        except BaseException:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise ConfigurationError(
                f"Port {port} on {host} is in use; stop what uses it, or choose another port with {option}."
            ) from error
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise ConfigurationError(f"Cannot listen on {host} port {port}: {reason}.") from error
    return listener


def is_address(host: str) -> bool:
    """Return whether a host is an IP address, and no name."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Return whether who listens on this address or name is reached from its own machine alone.

    A server that listens for IPv4 and IPv6 at once sees IPv4 in IPv6: ``::ffff:127.0.0.1``.
    """
    try:
        address = ip_address(host)
    except ValueError:
        return host.lower() == "localhost"
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return (mapped or address).is_loopback


def base_url(host: str, port: int, scheme: str = "http") -> str:
    """Return ``http://host:port``."""
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def url_of(listener: socket.socket, scheme: str = "http") -> str:
    """Return the base URL of a bound socket."""
    host, port = listener.getsockname()[:2]
    return base_url(host, port, scheme)


def check_url(url: str) -> str:
    """Return a base URL without its final slash. Raises ConfigurationError unless it is ``http(s)://host[:port]``."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        parts = urlsplit("")
    path = parts.path.rstrip("/")
    if parts.scheme not in {"http", "https"} or not parts.hostname or path or parts.query or parts.fragment:
        raise ConfigurationError(f"{url!r} is not the base URL of a server; it must look like http://host:port.")
    return url.rstrip("/")


def check_instance_url(url: str) -> str:
    """Do what ``check_url`` does for an instance behind a proxy; raises ConfigurationError for credentials too.

    Calls have the ``Authorization`` of the client, and whoever sees the instance sees its URL.
    """
    checked = check_url(url)
    if "@" in urlsplit(checked).netloc:
        raise ConfigurationError(
            "The URL of an instance can't hold a user's name or a password, since its calls have the client's Authorization; "
            "it must look like http://host:port."
        )
    return checked
