"""JPEG: segments up to the first scan, and the number of scans."""

from __future__ import annotations

import re

from chiasm.media.headers.steps import MAX_EXIF_BYTES, MAX_SCANS, Steps, at_most, check_exif

_MAX_JUNK_BYTES = 64 << 10
"""Between segments; Pillow reads it byte by byte."""
_MAX_PHOTOSHOP_BYTES = 1 << 20
"""In all segments of Photoshop, whose parts Pillow lists."""
_SOI, _EOI, _SOS, _APP1, _APP13 = 0xD8, 0xD9, 0xDA, 0xE1, 0xED
_BARE = frozenset({0x00, 0x01, *range(0xD0, 0xDA), 0xC8, *range(0xF0, 0xFE)})
"""What Pillow takes for markers without a length, and for escaped bytes."""
_MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")
"""Ends the pixels of a scan: they hold only escaped bytes and the markers of restarts."""


def walk(data: bytes, steps: Steps, max_pixels: int) -> int | None:
    """Walk over a JPEG and return the number of its scans: each goes over all pixels. See ``steps.Walk``."""
    exif = bytearray()
    at = _walk_to_pixels(data, steps, exif)
    check_exif(bytes(exif))
    scans = 0
    while at < len(data):
        scans += 1
        at_most(MAX_SCANS, scans, "scans")
        at = _next_scan(data, at, steps)
    return max(1, scans)


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


def _next_scan(data: bytes, at: int, steps: Steps) -> int:
    """Return where the pixels of the scan after the one at ``at`` begin; the length of the file if it was the last one."""
    while (found := _MARKER.search(data, at)) is not None:
        kind = found[1][0]
        if kind == _EOI:
            break
        if kind in (0x01, _SOI):
            at = found.end()
            continue
        steps.take("segments")
        at = found.end() + max(2, int.from_bytes(data[found.end() : found.end() + 2], "big"))
        if kind == _SOS:
            return at
    return len(data)
