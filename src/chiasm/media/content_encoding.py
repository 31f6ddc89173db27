"""Undoes the compression of an HTTP response that was sent compressed although that was not asked for."""

from __future__ import annotations

import zlib

_GZIP, _ZLIB, _RAW = 31, 15, -15
"""Values of zlib's ``wbits``."""
_GZIP_START = b"\x1f\x8b"
_MAX_MEMBERS = 64
"""Of a gzip file, each of which is decompressed by itself."""
DECOMPRESSED = frozenset({"gzip", "x-gzip", "deflate"})


class CompressionError(Exception):
    """The data is not what its encoding says, or it is cut off."""


class ExpandedTooLargeError(Exception):
    """The data is larger than the limit once it is decompressed."""


def decompress(data: bytes, encoding: str, max_bytes: int) -> bytes:
    """Return what ``data`` holds; ``encoding`` is one of DECOMPRESSED. Blocks, so call it in a thread.

    Never makes more than ``max_bytes`` and one byte of it. Raises CompressionError and ExpandedTooLargeError.
    """
    # Some servers send deflate without the header of zlib, which begins with the method 8 and a checksum modulo 31.
    is_zlib = len(data) >= 2 and data[0] & 15 == 8 and int.from_bytes(data[:2], "big") % 31 == 0
    kind = (_ZLIB if is_zlib else _RAW) if encoding == "deflate" else _GZIP
    pieces: list[bytes] = []
    left = max_bytes + 1
    try:
        for _ in range(_MAX_MEMBERS):
            stream = zlib.decompressobj(kind)
            pieces.append(stream.decompress(data, left))
            left -= len(pieces[-1])
            if left <= 0:
                raise ExpandedTooLargeError
            if not stream.eof:
                raise CompressionError
            data = stream.unused_data
            if kind != _GZIP or not data.startswith(_GZIP_START):
                return b"".join(pieces)
    except zlib.error:
        raise CompressionError from None
    raise CompressionError
