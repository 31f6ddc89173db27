"""The process in which a Decoder decodes what may take long.

An order is a file, and an answer the pixels as raw bytes, each after a header of fixed size.
"""

from __future__ import annotations

import enum
import struct

from chiasm.bounded_process import carry_out_orders

ORDER = "<Q"
"""The greatest number of pixels; the file follows."""
ANSWER = "<BLL"
"""Outcome, width, height; the pixels follow row by row, or a message."""
_BYTES_PER_PIXEL = 48
"""Decoding has several copies of the pixels in memory, of up to 8 bytes each, and converts them."""


class Outcome(enum.IntEnum):
    """How decoding ended."""

    DECODED = 0
    TOO_LARGE = 1
    INVALID = 2
    TOO_EXPENSIVE = 3
    """It needs more memory than the limit."""


def _more_bytes(order: memoryview) -> int:
    max_pixels: int = struct.unpack_from(ORDER, order)[0]
    return len(order) * 2 + max_pixels * _BYTES_PER_PIXEL


def _answer(order: memoryview) -> tuple[bytes, bytes]:
    (max_pixels,) = struct.unpack_from(ORDER, order)
    outcome, width, height, content = _decode(bytes(order[struct.calcsize(ORDER) :]), max_pixels)
    return struct.pack(ANSWER, outcome, width, height), content


def _decode(data: bytes, max_pixels: int) -> tuple[Outcome, int, int, bytes]:
    from chiasm.errors import Code, MediaError
    from chiasm.media.config import MediaConfig
    from chiasm.media.image import decode

    try:
        image = decode(data, MediaConfig(max_image_pixels=max_pixels))
    except MediaError as error:
        cause = error.__cause__
        if isinstance(cause, MemoryError) or "out of memory" in str(cause):  # Pillow raises an OSError
            return Outcome.TOO_EXPENSIVE, 0, 0, b""
        outcome = Outcome.TOO_LARGE if error.code == Code.IMAGE_TOO_LARGE else Outcome.INVALID
        return outcome, 0, 0, error.message.encode()
    return Outcome.DECODED, image.width, image.height, image.tobytes()


def main() -> None:
    """Decode file after file."""
    carry_out_orders(_answer, _more_bytes)


if __name__ == "__main__":
    main()
