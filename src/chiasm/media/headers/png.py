"""PNG: chunks up to the pixels, and whether those behind are as few as an image needs."""

from __future__ import annotations

from chiasm.media.headers.steps import MAX_STEPS, UNKNOWN, Steps, check_exif

_CHUNK_BYTES = 4096
"""Encoders put at least so much into a chunk of pixels. Pillow reads each chunk in Python."""


def walk(data: bytes, steps: Steps, max_pixels: int) -> int | None:
    """Walk over the chunks of a PNG. See ``steps.Walk``."""
    at = 8
    while data[at + 4 : at + 8] not in (b"IDAT", b"IEND", b""):
        steps.take("chunks")
        length = int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] == b"eXIf":
            check_exif(data[at + 8 : at + 8 + length])
        at += length + 12
    for _ in range(MAX_STEPS + len(data) // _CHUNK_BYTES):
        if at >= len(data):
            return 1
        at += int.from_bytes(data[at : at + 4], "big") + 12
    return 1 if at >= len(data) else UNKNOWN
