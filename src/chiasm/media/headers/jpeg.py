"""JPEG: segments up to the first scan, and the number of scans."""

from __future__ import annotations

from chiasm.media.headers.steps import MAX_EXIF_BYTES, MAX_SCANS, Steps, at_most, check_exif

_MAX_JUNK_BYTES = 64 << 10
"""Between segments; Pillow reads it byte by byte."""
_MAX_PHOTOSHOP_BYTES = 1 << 20
"""In all segments of Photoshop, whose parts Pillow lists."""
_SOS, _APP1, _APP13 = 0xDA, 0xE1, 0xED
_SCAN, _END = b"\xff\xda", b"\xff\xd9"
_BARE = frozenset({0x00, 0x01, *range(0xD0, 0xDA), 0xC8, *range(0xF0, 0xFE)})
"""What Pillow takes for markers without a length, and for escaped bytes."""


def walk(data: bytes, steps: Steps, max_pixels: int) -> int | None:
    """Walk over a JPEG and return at least the number of its scans: each goes over all pixels. See ``steps.Walk``.

    No scan begins without its marker, so no more than these are decoded. Those behind an end may belong to another image in the
    file, so they are no reason to refuse it.
    """
    exif = bytearray()
    at = _walk_to_pixels(data, steps, exif)
    check_exif(bytes(exif))
    scans = 1 + data.count(_SCAN, at)
    if scans > MAX_SCANS:
        end = data.find(_END, at)
        at_most(MAX_SCANS, 1 + data.count(_SCAN, at, end if end >= 0 else len(data)), "scans")
    return scans


def _walk_to_pixels(data: bytes, steps: Steps, exif: bytearray) -> int:
    """Return where the pixels of the first scan begin; the length of the file if there are none. Adds to ``exif``."""
    at = 2
    junk = photoshop = 0
    while True:
        marker = data.find(b"\xff", at, at + _MAX_JUNK_BYTES + 1)
        junk += (marker if marker >= 0 else min(len(data), at + _MAX_JUNK_BYTES + 1)) - at
        at_most(_MAX_JUNK_BYTES, junk, "bytes between segments")
        if marker < 0 or marker + 1 >= len(data):
            return len(data)
        kind = data[marker + 1]
        if kind == 0xFF:  # a byte that fills
            junk += 1
            at = marker + 1
            continue
        if kind in _BARE:
            junk += 2
            at = marker + 2
            continue
        steps.take("segments")
        length = int.from_bytes(data[marker + 2 : marker + 4], "big")
        if length < 2:
            raise ValueError("A segment is shorter than its length.")
        at = marker + 2 + length
        if kind == _SOS:
            return at
        if kind == _APP1 and data.startswith(b"Exif\0\0", marker + 4):
            exif += data[marker + 4 + 6 * bool(exif) : at]  # Pillow joins all segments
            at_most(MAX_EXIF_BYTES, len(exif), "bytes of EXIF data")
        elif kind == _APP13:
            photoshop += length
            at_most(_MAX_PHOTOSHOP_BYTES, photoshop, "bytes of Photoshop's data")
