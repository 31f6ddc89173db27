"""Encodes and decodes ``data:`` URLs.

Large ones are converted in slices, so that a thread that converts one gives up the interpreter's lock in between.
"""

from __future__ import annotations

import binascii
import re
from typing import NamedTuple

import msgspec

from chiasm.errors import Code, MediaError

_HEADER_BYTES = 1024
"""The longest part before the comma."""
_HEADER = re.compile(rb"[\0-\x20]*data:.*; *base64 *", re.IGNORECASE | re.DOTALL)
_PLAIN_HEADER = re.compile(rb"data:[!-~]*;base64")
_SLICE_CHARACTERS = 1 << 20
"""Base64 characters that are decoded at once; a multiple of 4."""
_SLICE_BYTES = 3 << 18
"""Bytes that are encoded at once; a multiple of 3."""
_WHITE_SPACE = b"\t\n\f\r "
_FROM_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_base64 = msgspec.json.Decoder(bytes)


class DataURL(NamedTuple):
    """What a ``data:`` URL holds."""

    data: bytes
    base64: memoryview
    """The same in plain base64: padded, in the alphabet with + and /, without white space. JSON needs no escapes for it."""
    is_plain: bool
    """Whether the URL is in the form that every server reads."""


def decode_data_url(url: bytes, max_bytes: int) -> DataURL:
    """Decode ``data:…;base64,…``. Raises MediaError; ``max_bytes`` is checked before anything is decoded.

    Like browsers, and a little more, it takes base64 without padding, with white space (such as the ends of MIME's lines of 76
    characters), with percent-encoded characters, and in the URL-safe alphabet.
    """
    comma = url.find(b",", 0, _HEADER_BYTES)
    if comma < 0 or not _HEADER.fullmatch(url, 0, comma):
        raise MediaError("A data: URL must have the form data:image/png;base64,DATA.", code=Code.INVALID_URL)
    plain = memoryview(url)[comma + 1 :]
    if _size(plain) <= max_bytes and (data := _decoded(plain)) is not None:
        return DataURL(data, plain, is_plain=_PLAIN_HEADER.fullmatch(url, 0, comma) is not None)
    plain = _plain(url, comma + 1)
    if _size(plain) > max_bytes:
        raise too_large(max_bytes)
    data = _decoded(plain)
    if data is None:
        raise MediaError("The data: URL does not contain valid base64.", code=Code.INVALID_BASE64)
    return DataURL(data, plain, is_plain=False)


def encode_data_url(media_type: str, data: bytes) -> bytes:
    """Return ``data`` as a ``data:`` URL."""
    view = memoryview(data)
    slices = [
        binascii.b2a_base64(view[at : at + _SLICE_BYTES], newline=False) for at in range(0, len(data), _SLICE_BYTES)
    ]
    return b"".join((b"data:%b;base64," % media_type.encode(), *slices))


def too_large(max_bytes: int) -> MediaError:
    """Return the error for an image file of more than ``max_bytes``, however it was sent."""
    return MediaError(f"The image file is larger than the limit of {max_bytes:,} bytes.", code=Code.MEDIA_TOO_LARGE)


def _size(plain: memoryview) -> int:
    return len(plain) // 4 * 3 - bytes(plain[-2:]).count(b"=")


def _decoded(plain: memoryview) -> bytes | None:
    """Return the bytes that plain base64 stands for; None if it isn't plain."""
    if len(plain) % 4:
        return None
    slices = [plain[at : at + _SLICE_CHARACTERS] for at in range(0, len(plain), _SLICE_CHARACTERS)]
    try:
        # msgspec needs less time than the standard library. It also reads the escapes of JSON: these, and padding in the
        # middle, stand for fewer bytes than plain base64 of that length.
        pieces = [_base64.decode(b"".join((b'"', one, b'"'))) for one in slices]
    except msgspec.MsgspecError:
        return None
    data = b"".join(pieces)
    return data if len(data) == _size(plain) else None


def _plain(url: bytes, start: int) -> memoryview:
    """Return plain base64 if the URL, from ``start``, holds base64 of any kind that is read here."""
    pieces: list[bytes] = []
    while start < len(url):
        end = start + _SLICE_CHARACTERS
        code = url.rfind(b"%", end - 2, end)  # a code is not cut in two
        end = code if code > start else end
        pieces.append(_plain_piece(url[start:end]))
        start = end
        if b"%" in pieces[-1]:  # a wrong code, which makes all of it invalid
            break
    text = b"".join(pieces)
    end = len(text)
    while end > max(0, len(text) - 2) and text[end - 1] == ord("="):
        end -= 1
    if text[end - 1 : end] != b"=":  # otherwise there is too much of it
        text = text[:end] + b"=" * (-end % 4)
    return memoryview(text)


def _plain_piece(text: bytes) -> bytes:
    text = text.translate(_FROM_URL_SAFE, _WHITE_SPACE)
    if b"%" in text:
        for character in b"+/=-_\r\n\t ":
            plain = bytes((character,)).translate(_FROM_URL_SAFE, _WHITE_SPACE)
            for code in {b"%%%02X" % character, b"%%%02x" % character}:
                text = text.replace(code, plain)
    return text
