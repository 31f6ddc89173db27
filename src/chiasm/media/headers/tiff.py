"""TIFF: the first directory.

A TIFF says by offsets where everything is, so a small file can ask for much: millions of strips, or tiles that are larger than
any image. (The data of all tags together is bounded by Pillow: it is not larger than the file.)
"""

from __future__ import annotations

import struct

from chiasm.media.headers.steps import MAX_STEPS, UNKNOWN, Steps, at_most

_MAX_VALUES = 1 << 18
"""Of a tag whose values Pillow reads as numbers, such as the offsets of all strips."""
_BASELINE = range(254, 533)
_TEXTS = frozenset({270, 305, 306, 315, 316, 347})
"""Tags in that range that hold text or tables, which are not read as numbers."""
_TILE_WIDTH, _TILE_LENGTH = 322, 323


def walk(data: bytes, steps: Steps, max_pixels: int) -> int | None:
    """Walk over the first directory of a TIFF. Strips may overlap, so nothing is known of its costs. See ``steps.Walk``."""
    order = "<" if data[0] == ord("I") else ">"
    is_big = data[2:4] in (b"+\0", b"\0+")
    start = struct.unpack_from(f"{order}{'Q' if is_big else 'L'}", data, 8 if is_big else 4)[0]
    number, entry = (f"{order}Q", f"{order}HHQ") if is_big else (f"{order}H", f"{order}HHL")
    count = struct.unpack_from(number, data, start)[0]
    at_most(MAX_STEPS, count, "entries of its directory")
    tile = {}
    for index in range(count):
        steps.take("entries of its directory")
        at = start + struct.calcsize(number) + index * (20 if is_big else 12)
        tag, kind, values = struct.unpack_from(entry, data, at)
        if tag in _BASELINE and tag not in _TEXTS:
            at_most(_MAX_VALUES, values, "values of a tag")
        if tag in (_TILE_WIDTH, _TILE_LENGTH):
            form = {3: "H", 4: "L", 16: "Q"}.get(kind, "B")
            tile[tag] = struct.unpack_from(f"{order}{form}", data, at + struct.calcsize(entry))[0]
    at_most(max_pixels, int(tile.get(_TILE_WIDTH, 0)) * int(tile.get(_TILE_LENGTH, 0)), "pixels in a tile")
    return UNKNOWN
