"""How much a JSON body would become when it is decoded: bounded before anything is built of it.

Decoding holds the interpreter, in a thread too. So a large body is first walked in small pieces, and what would become too many
objects is never decoded.
"""

from __future__ import annotations

from chiasm.errors import Code, InvalidRequestError

INLINE_BYTES = 1 << 20
"""A larger body is checked and decoded beside the event loop."""
MAX_JSON_MEMBERS = 1 << 17
"""Objects, arrays and members of objects in a body."""
MAX_JSON_VALUES = 1 << 19
"""Values in a body that follow another one in an array or an object."""
_PIECE_BYTES = 64 << 10
_STARTS = (b"{", b"[", b":")


def check_json_size(body: bytes) -> None:
    """Raise InvalidRequestError if a body of more than INLINE_BYTES has more objects, arrays, members or values than the limit.

    What stands in strings doesn't count. No step holds the interpreter for more than a few milliseconds.
    """
    if len(body) <= INLINE_BYTES:
        return
    members = values = 0
    in_string = False
    start = 0
    while start < len(body):
        end = min(start + _PIECE_BYTES, len(body))
        piece = body[start:end]
        while piece.endswith(b"\\") and end < len(body) and _ends_in_escape(piece):
            piece += body[end : end + 1]
            end += 1
        start = end
        pieces = piece.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
        outside = b"".join(pieces[1::2] if in_string else pieces[::2])
        in_string ^= len(pieces) % 2 == 0
        members += sum(outside.count(sign) for sign in _STARTS)
        values += outside.count(b",")
        if members > MAX_JSON_MEMBERS or values > MAX_JSON_VALUES:
            raise InvalidRequestError(
                f"The body has more than {MAX_JSON_MEMBERS} objects, arrays and members, or more than {MAX_JSON_VALUES} "
                "values; send less in one request.",
                code=Code.INVALID_JSON,
            )


def _ends_in_escape(piece: bytes) -> bool:
    """Whether the last backslash of the piece escapes what follows it."""
    return (len(piece) - len(piece.rstrip(b"\\"))) % 2 == 1
