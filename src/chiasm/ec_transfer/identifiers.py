"""Which names of entries are accepted."""

from __future__ import annotations

import re

from chiasm.errors import InvalidRequestError

_IDENTIFIER = re.compile(r"[0-9a-f]{64}")
_SHOWN_CHARACTERS = 80


def check_identifier(identifier: object) -> str:
    """Return ``identifier`` if it is exactly 64 lower-case hex digits, else raise InvalidRequestError.

    An identifier becomes part of a file name or of a remote key, so whatever comes from outside passes through here
    before anything is made of it.
    """
    if isinstance(identifier, str) and _IDENTIFIER.fullmatch(identifier):
        return identifier
    shown = (
        repr(identifier[:_SHOWN_CHARACTERS])[:_SHOWN_CHARACTERS]
        if isinstance(identifier, str)
        else type(identifier).__name__
    )
    raise InvalidRequestError(
        f"an item's uuid must be exactly 64 lower-case hex digits, not {shown}; leave it out to have the content named",
        param="uuid",
        code="invalid_uuid",
    )
