"""AVIF: boxes. The library compares each item of the file with all others, so their lists are bounded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from chiasm.media.headers.steps import UNKNOWN, Steps, at_most

_MAX_LIST_BYTES = 64 << 10
"""Of a box that lists items."""
_MAX_MOVIE_BYTES = 256 << 10
"""Of the box that lists the frames of a sequence."""
_FULL_BOX_BYTES = 4
"""Version and flags, before the boxes in ``meta``."""
_OTHER_THAN_LISTS = frozenset({b"iprp", b"idat", b"free", b"skip"})


class _Box(NamedTuple):
    kind: bytes
    start: int
    """Where its content begins."""
    end: int


def walk(data: bytes, steps: Steps, max_pixels: int) -> int | None:
    """Walk over the boxes of an AVIF. Its codec says nothing of its costs. See ``steps.Walk``."""
    for box in _boxes(data, 0, len(data), steps):
        if box.kind == b"moov":
            at_most(_MAX_MOVIE_BYTES, box.end - box.start, "bytes about frames")
        if box.kind == b"meta":
            for part in _boxes(data, box.start + _FULL_BOX_BYTES, box.end, steps):
                _check_part(data, part, steps)
    return UNKNOWN


def _check_part(data: bytes, part: _Box, steps: Steps) -> None:
    if part.kind not in _OTHER_THAN_LISTS:
        at_most(_MAX_LIST_BYTES, part.end - part.start, "bytes about items")
    if part.kind == b"iprp":
        for one in _boxes(data, part.start, part.end, steps):
            if one.kind == b"ipco":
                for _ in _boxes(data, one.start, one.end, steps):
                    pass
            else:
                at_most(_MAX_LIST_BYTES, one.end - one.start, "bytes about items")


def _boxes(data: bytes, at: int, end: int, steps: Steps) -> Iterator[_Box]:
    """Yield the boxes of a part of the file."""
    while at + 8 <= end:
        steps.take("boxes")
        size, head = int.from_bytes(data[at : at + 4], "big"), 8
        if size == 1:
            size, head = int.from_bytes(data[at + 8 : at + 16], "big"), 16
        elif size == 0:
            size = end - at
        if size < head:
            raise ValueError("A box is shorter than its length.")
        yield _Box(data[at + 4 : at + 8], at + head, min(end, at + size))
        at += size
