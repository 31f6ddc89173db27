"""How much a JSON body would become when it is decoded: bounded before anything is built of it.

Decoding holds the interpreter, in a thread too. So a body is first walked in small pieces, and what would become too many
objects or too much text is never decoded.
"""

from __future__ import annotations

from chiasm.errors import Code, InvalidRequestError, PayloadTooLargeError
from chiasm.http.limits import Limit

INLINE_BYTES = 1 << 20
"""A larger body is checked and decoded beside the event loop."""
MAX_TEXT_BYTES = 8 << 20
"""What a body may have besides images in base64, unless the configuration says something else."""
MAX_JSON_MEMBERS = 1 << 16
"""Objects, arrays and members of objects in a body."""
MAX_JSON_VALUES = 1 << 19
"""Values in a body that follow another one in an array or an object."""
_UNCOUNTED_BYTES = 64 << 10
"""What a smaller body becomes takes a few milliseconds, whatever it says."""
_PIECE_BYTES = 64 << 10
_STARTS = (b"{", b"[", b":")


class JsonSize:
    """Counts what one or several pieces of JSON would become together."""

    def __init__(self) -> None:
        self._members = 0
        self._values = 0

    def add(self, text: bytes) -> None:
        """Count a whole piece of JSON. Raises InvalidRequestError if all together have more values than the limits.

        What stands in strings doesn't count. No step holds the interpreter for more than a few milliseconds.
        """
        in_string = False
        start = 0
        while start < len(text):
            end = min(start + _PIECE_BYTES, len(text))
            piece = text[start:end]
            while piece.endswith(b"\\") and end < len(text) and _ends_in_escape(piece):
                piece += text[end : end + 1]
                end += 1
            start = end
            pieces = piece.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
            outside = b"".join(pieces[1::2] if in_string else pieces[::2])
            in_string ^= len(pieces) % 2 == 0
            self._members += sum(outside.count(sign) for sign in _STARTS)
            self._values += outside.count(b",")
            if self._members > MAX_JSON_MEMBERS:
                raise _too_many(f"{MAX_JSON_MEMBERS} objects, arrays and members", Limit.JSON_MEMBERS)
            if self._values > MAX_JSON_VALUES:
                raise _too_many(f"{MAX_JSON_VALUES} values", Limit.JSON_VALUES)


def check_json_size(body: bytes) -> None:
    """Raise InvalidRequestError if a body has more objects, arrays, members or values than the limits."""
    if len(body) > _UNCOUNTED_BYTES:
        JsonSize().add(body)


def check_text_size(body: bytes, max_bytes: int) -> None:
    """Raise PayloadTooLargeError if a body, without what was lifted out of it, is too large to be decoded."""
    if len(body) > max_bytes:
        raise PayloadTooLargeError(
            f"The body has {len(body)} bytes besides images in base64, and the limit is {max_bytes} bytes.",
            code=Code.BODY_TOO_LARGE,
            limit=Limit.TEXT_BYTES,
        )


def _too_many(what: str, limit: Limit) -> InvalidRequestError:
    return InvalidRequestError(
        f"The body has more than {what}; send less in one request.", code=Code.INVALID_JSON, limit=limit
    )


def _ends_in_escape(piece: bytes) -> bool:
    """Whether the last backslash of the piece escapes what follows it."""
    return (len(piece) - len(piece.rstrip(b"\\"))) % 2 == 1
