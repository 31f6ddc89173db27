"""Encodes and decodes ``data:`` URLs.

Large ones are converted in slices, so that a thread that converts one gives up the interpreter's lock in between.
"""

from __future__ import annotations

import binascii

import msgspec

from chiasm.errors import Code, MediaError

_HEADER_BYTES = 1024
"""The longest part before the comma."""
_SLICE_CHARACTERS = 1 << 20
"""Base64 characters that are decoded at once; a multiple of 4."""
_SLICE_BYTES = 3 << 18
"""Bytes that are encoded at once; a multiple of 3."""
_base64 = msgspec.json.Decoder(bytes)


def decode_data_url(url: bytes, max_bytes: int) -> bytes:
    """Return the bytes of ``data:…;base64,…``. Raises MediaError; ``max_bytes`` is checked before anything is decoded."""
    comma = url.find(b",", 0, _HEADER_BYTES)
    header = url[: max(comma, 0)].lower()
    if not header.startswith(b"data:") or not header.endswith(b";base64"):
        raise MediaError("A data: URL must have the form data:image/png;base64,DATA.", code=Code.INVALID_URL)
    payload = memoryview(url)[comma + 1 :]
    padding = url[-2:].count(b"=")
    if len(payload) // 4 * 3 - padding > max_bytes:
        raise too_large(max_bytes)
    if url.find(b"=", comma + 1, len(url) - 2) >= 0:
        raise _invalid()
    slices = [payload[at : at + _SLICE_CHARACTERS] for at in range(0, len(payload), _SLICE_CHARACTERS)]
    try:
        # msgspec needs a third of the time of the standard library.
        return b"".join([_base64.decode(b"".join((b'"', one, b'"'))) for one in slices])
    except msgspec.MsgspecError:
        raise _invalid() from None


def encode_data_url(media_type: str, data: bytes) -> bytes:
    """Return ``data`` as a ``data:`` URL."""
    view = memoryview(data)
    slices = [
        binascii.b2a_base64(view[at : at + _SLICE_BYTES], newline=False) for at in range(0, len(data), _SLICE_BYTES)
    ]
    return b"data:%b;base64," % media_type.encode() + b"".join(slices)


def too_large(max_bytes: int) -> MediaError:
    """Return the error for an image file of more than ``max_bytes``, however it was sent."""
    return MediaError(f"The image file is larger than the limit of {max_bytes:,} bytes.", code=Code.MEDIA_TOO_LARGE)


def _invalid() -> MediaError:
    return MediaError("The data: URL does not contain valid base64.", code=Code.INVALID_BASE64)
