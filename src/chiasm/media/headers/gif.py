"""GIF: blocks up to the first frame. Pillow reads no other frame."""

from __future__ import annotations

from chiasm.media.headers.steps import Steps, at_most

_MAX_BLOCK_BYTES = 1 << 20
_MAX_BLOCKS = _MAX_BLOCK_BYTES // 255
"""Of at most 255 bytes, in all comments and extensions before the first frame."""
_EXTENSION, _FRAME, _END = 0x21, 0x2C, 0x3B


def walk(data: bytes, steps: Steps, max_pixels: int) -> int | None:
    """Walk over the blocks of a GIF. See ``steps.Walk``."""
    flags = data[10]
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    blocks = 0
    while at < len(data) and data[at] not in (_FRAME, _END):
        steps.take("extensions")
        if data[at] != _EXTENSION:  # a byte that Pillow passes over
            at += 1
            continue
        at += 2
        while at < len(data) and data[at]:
            blocks += 1
            at_most(_MAX_BLOCKS, blocks, "blocks before the first frame")
            at += 1 + data[at]
        at += 1
    return 1
