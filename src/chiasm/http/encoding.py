"""``Content-Encoding`` of a body: decompressed piece by piece, so that its size is known before it is in memory."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from chiasm.errors import Code, InvalidRequestError, UnsupportedMediaTypeError

ACCEPTED = ("gzip", "deflate")
_ALIASES = {"x-gzip": "gzip"}
_PIECE_BYTES = 64 << 10
_SHOWN_CHARACTERS = 40
_ZLIB = zlib.MAX_WBITS
_RAW = -zlib.MAX_WBITS
_GZIP = zlib.MAX_WBITS | 16


class Decompressor:
    """Decompresses one body."""

    def __init__(self, coding: str) -> None:
        """``coding`` is one of ACCEPTED."""
        self._coding = coding
        self._stream: zlib._Decompress | None = None
        """None before the body, and between the members of a gzip file."""
        self._has_ended = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield what ``data`` decompresses to, in pieces of at most 64 KiB; some are empty.

        Each takes well under a millisecond, so an event loop can do something else between them. Raises InvalidRequestError.
        """
        try:
            while data:
                yield from self._pieces(data[:_PIECE_BYTES])
                data = data[_PIECE_BYTES:]
        except zlib.error:
            raise self._corrupt("is not valid") from None

    def end(self) -> None:
        """Raise InvalidRequestError if the body ended too early."""
        if not self._has_ended:
            raise self._corrupt("ends too early")

    def _pieces(self, data: bytes) -> Iterator[bytes]:
        while True:
            if self._stream is None:
                self._stream = self._begin(data)
            piece = self._stream.decompress(data, _PIECE_BYTES)
            yield piece
            data = self._stream.unconsumed_tail
            if self._stream.eof:
                data, self._stream, self._has_ended = self._stream.unused_data, None, True
            if not data and (self._has_ended or len(piece) < _PIECE_BYTES):
                return

    def _begin(self, data: bytes) -> zlib._Decompress:
        """Return what decompresses a stream that begins with ``data``."""
        if self._coding == "gzip":
            self._has_ended = False
            return zlib.decompressobj(_GZIP)
        if self._has_ended:
            raise self._corrupt("has more than one stream, which is not valid")
        # HTTP means zlib's format, whose first byte has 8 in its lower half; some clients send the bare stream.
        return zlib.decompressobj(_ZLIB if data[0] & 0x0F == zlib.DEFLATED else _RAW)

    def _corrupt(self, how: str) -> InvalidRequestError:
        return InvalidRequestError(
            f"The body {how} as {self._coding}, which its Content-Encoding names; send it whole, or uncompressed.",
            code=Code.INVALID_ENCODING,
        )


def decompressor(content_encoding: str) -> Decompressor | None:
    """Return what decompresses a body with this header; None if it isn't compressed. Raises UnsupportedMediaTypeError."""
    coding = content_encoding.strip().lower()
    if coding in ("", "identity"):
        return None
    coding = _ALIASES.get(coding, coding)
    if coding not in ACCEPTED:
        raise UnsupportedMediaTypeError(
            f"The Content-Encoding {content_encoding[:_SHOWN_CHARACTERS]!r} is not supported; send the body uncompressed, or "
            f"compressed once with {' or '.join(ACCEPTED)}.",
            code=Code.UNSUPPORTED_ENCODING,
        )
    return Decompressor(coding)
