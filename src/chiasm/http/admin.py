"""The admin key: who may see and change what belongs to the operator of a server, and not to its clients."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_address

from starlette.datastructures import Headers
from starlette.types import Scope

from chiasm.errors import AuthenticationError
from chiasm.http.keys import bearer, digest_of, is_one_of

_FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip")
"""Headers by which a reverse proxy says that it speaks for somebody else."""


class AdminCheck:
    """Tells the operator of a server from its clients.

    The operator has the admin key. On a server without one, whoever asks from the server's own machine may see what the
    operator may; nobody may change anything.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [digest_of(key) for key in keys]

    @property
    def has_key(self) -> bool:
        """Whether there is an admin key."""
        return bool(self._digests)

    def may_see(self, scope: Scope) -> bool:
        """Return whether who asks may see what the operator may."""
        if self._digests:
            return is_one_of(bearer(Headers(scope=scope)), self._digests)
        return _is_local(scope)

    def check_may_see(self, scope: Scope) -> None:
        """Raise AuthenticationError unless who asks may see what the operator may."""
        if not self.may_see(scope):
            raise AuthenticationError(
                "This is for the operator of the server. Send the admin key as a bearer token."
                if self._digests
                else "This is for the operator of the server. Ask from its own machine, or start it with --admin-key-file."
            )

    def check_may_change(self, scope: Scope) -> None:
        """Raise AuthenticationError unless the request has the admin key."""
        if not is_one_of(bearer(Headers(scope=scope)), self._digests):
            raise AuthenticationError("Send the admin key as a bearer token.")


def _is_local(scope: Scope) -> bool:
    """Return whether a request comes from this machine, and not through a reverse proxy on it."""
    headers = Headers(scope=scope)
    if any(name in headers for name in _FORWARDED):
        return False
    client = scope.get("client")
    try:
        return client is None or not client[0] or ip_address(client[0]).is_loopback
    except ValueError:
        return False
