"""The header fields of a request, in which each look costs the same however many there are."""

from __future__ import annotations

from typing import Any

from starlette.datastructures import Headers
from starlette.types import Scope


class Fields(Headers):
    """Starlette's headers of a request, with an index of the first value of each name.

    A key in ``X-Api-Key`` is found as the bearer token of ``Authorization``, unless there is one.
    """

    def __init__(self, scope: Scope) -> None:
        super().__init__(raw=scope["headers"])
        self._first = dict(reversed(self._list))
        if (key := self._first.get(b"x-api-key")) is not None:  # so clients of Anthropic send it
            self._first.setdefault(b"authorization", b"Bearer " + key)

    def __getitem__(self, key: str) -> str:
        return self._first[key.lower().encode("latin-1")].decode("latin-1")

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and key.lower().encode("latin-1") in self._first

    def get(self, key: str, default: Any = None) -> Any:
        """Return the first value of a field, or ``default``."""
        found = self._first.get(key.lower().encode("latin-1"))
        return default if found is None else found.decode("latin-1")
