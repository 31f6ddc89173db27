"""The admin key: who may see and change what belongs to the operator of a server, and not to its clients."""

from __future__ import annotations

from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import Scope

from chiasm.errors import AuthenticationError
from chiasm.http.key_rules import read_admin_keys
from chiasm.http.keys import bearer, digest_of, is_one_of
from chiasm.http.neighbours import is_neighbour
from chiasm.http.watch import Replaceable


class AdminCheck(Replaceable[list[bytes]]):
    """Tells the operator of a server from its clients.

    The operator has the admin key, or one of those in a file, which may be replaced while the server runs. On a server without
    one, whoever asks from the server's own machine may see what the operator may; nobody may change anything. The process that
    has started the server may see that too, by a key of its own: where the server listens on one address alone, it doesn't ask
    over loopback.
    """

    kept = "the admin keys stay as they are"

    def __init__(self, key: str | None = None, file: Path | None = None, supervisor_key: str | None = None) -> None:
        """Raises ConfigurationError for a key that isn't fit, and for a file that can't be read or holds none."""
        super().__init__(() if file is None else (file,))
        self._supervisor = [] if supervisor_key is None else [digest_of(supervisor_key)]
        self._key = key
        self._file = file
        self._digests = self._read()

    def _read(self) -> list[bytes]:
        return [digest_of(key) for key in read_admin_keys(self._key, self._file)]

    def _take(self, read: list[bytes]) -> str:
        self._digests = read
        return f"the admin keys were read again: there are {len(read)}"

    @property
    def has_key(self) -> bool:
        """Whether there is an admin key."""
        return bool(self._digests)

    def may_see(self, scope: Scope) -> bool:
        """Return whether who asks may see what the operator may."""
        if is_one_of(bearer(Headers(scope=scope)), [*self._digests, *self._supervisor]):
            return True
        return not self._digests and is_neighbour(scope)

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
