"""``data:`` URLs and the bytes that they hold.

Large ones are converted slice by slice, so that a thread which does it lets the event loop have its turns in between.
"""

from __future__ import annotations

import binascii

import msgspec

from chiasm.errors import MediaError

_HEADER_BYTES = 1024
"""What may come before the comma."""
_SLICE_CHARACTERS = 1 << 20
"""Of base64; a multiple of 4."""
_SLICE_BYTES = 3 << 18
"""Of what base64 is made from; a multiple of 3."""
_base64 = msgspec.json.Decoder(bytes)


def decode_data_url(url: bytes, max_bytes: int) -> bytes:
    """The bytes of ``data:…;base64,…``. Raises MediaError; the limit is checked before anything is decoded."""
    comma = url.find(b",", 0, _HEADER_BYTES)
    header = url[: max(comma, 0)].lower()
    if not header.startswith(b"data:") or not header.endswith(b";base64"):
        raise MediaError("a data: URL must look like data:image/png;base64,…", code="invalid_url")
    payload = memoryview(url)[comma + 1 :]
    padding = url[-2:].count(b"=")
    if len(payload) // 4 * 3 - padding > max_bytes:
        raise MediaError(f"media is larger than {max_bytes:,} bytes", code="media_too_large")
    if url.find(b"=", comma + 1, len(url) - 2) >= 0:
        raise _invalid()
    slices = [payload[at : at + _SLICE_CHARACTERS] for at in range(0, len(payload), _SLICE_CHARACTERS)]
    try:
        # msgspec decodes base64 in a third of the time that the standard library needs.
        return b"".join([_base64.decode(b"".join((b'"', one, b'"'))) for one in slices])
    except msgspec.MsgspecError:
        raise _invalid() from None


def encode_data_url(media_type: str, data: bytes) -> bytes:
    """``data`` as a ``data:`` URL."""
    view = memoryview(data)
    slices = [
        binascii.b2a_base64(view[at : at + _SLICE_BYTES], newline=False) for at in range(0, len(data), _SLICE_BYTES)
    ]
    return b"data:%b;base64," % media_type.encode() + b"".join(slices)


def _invalid() -> MediaError:
    return MediaError("the data: URL does not hold valid base64", code="invalid_base64")
