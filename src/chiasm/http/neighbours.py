"""Who asks from the machine itself, and is trusted where no key is set."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import Scope

from chiasm.http.listen import is_loopback

_BY_PROXIES = ("forwarded", "x-real-ip", "via")
_PREFIX = "x-forwarded-"


def is_neighbour(scope: Scope) -> bool:
    """Return whether a request comes from a process of this machine, which doesn't say that it asks for somebody else."""
    return comes_from_here(scope) and not is_forwarded(scope)


def comes_from_here(scope: Scope) -> bool:
    """Return whether the connection of a request was made on this machine: over loopback, or through a socket file."""
    client = scope.get("client")
    return client is None or not client[0] or is_loopback(client[0])


def is_forwarded(scope: Scope) -> bool:
    """Return whether a header says that a reverse proxy passes a request on."""
    return any(name in _BY_PROXIES or name.startswith(_PREFIX) for name in Headers(scope=scope))
