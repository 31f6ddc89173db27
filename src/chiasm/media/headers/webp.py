"""WebP: all chunks, since the library lists them before it decodes."""

from __future__ import annotations

from chiasm.media.headers.steps import UNKNOWN, Steps, at_most, check_exif

_MAX_FRAMES = 10_000
_ANIMATED = 0x02


def walk(data: bytes, steps: Steps, max_pixels: int) -> int | None:
    """Walk over the chunks of a WebP. Of an animation, the frames may overlap, so nothing is known. See ``steps.Walk``."""
    at = 12
    frames = 0
    while at + 8 <= len(data):
        kind, length = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        if kind == b"ANMF":
            frames += 1
            at_most(_MAX_FRAMES, frames, "frames")
        else:
            steps.take("chunks")
        if kind == b"EXIF":
            check_exif(data[at + 8 : at + 8 + length])
        at += 8 + length + (length & 1)
    return UNKNOWN if frames or (data[12:16] == b"VP8X" and data[20:21] and data[20] & _ANIMATED) else 1
