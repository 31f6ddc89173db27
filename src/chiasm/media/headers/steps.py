"""What a walk over a header may cost, and what it finds."""

from __future__ import annotations

from collections.abc import Callable

MAX_STEPS = 1_000
"""Segments, chunks, boxes or entries of a directory before the pixels."""
MAX_SCANS = 100
"""Of a JPEG. Encoders make ten to twenty."""
MAX_EXIF_BYTES = 1 << 20
UNKNOWN = None
"""The header doesn't say how often decoding goes over the pixels."""


class ExcessiveHeaderError(Exception):
    """The header has more parts than an image needs; the message says of what, and how many it may have."""


class Steps:
    """Counts what a walk looks at."""

    def __init__(self) -> None:
        self.taken = 0

    def take(self, what: str) -> None:
        """Count one part, called ``what`` in the plural. Raises ExcessiveHeaderError for one too many."""
        self.taken += 1
        if self.taken > MAX_STEPS:
            raise ExcessiveHeaderError(f"more than {MAX_STEPS:,} {what}")


Walk = Callable[[bytes, Steps, int], int | None]
"""Takes a file, where to count, and the greatest number of pixels. Returns how often decoding goes over the pixels, or UNKNOWN.

Raises ExcessiveHeaderError, and for a malformed header ValueError, IndexError or struct.error. A header that ends with the file
is no error: Pillow finds that out.
"""


def at_most(limit: int, found: int, what: str) -> None:
    """Raise ExcessiveHeaderError if there is more of something than the limit."""
    if found > limit:
        raise ExcessiveHeaderError(f"more than {limit:,} {what}")


def check_exif(exif: bytes) -> None:
    """Raise ExcessiveHeaderError for EXIF data whose first directory is larger than any camera's."""
    at_most(MAX_EXIF_BYTES, len(exif), "bytes of EXIF data")
    start = exif.find(b"II*\0", 0, 32), exif.find(b"MM\0*", 0, 32)
    for base, order in zip(start, ("little", "big"), strict=True):
        if base >= 0:
            directory = base + int.from_bytes(exif[base + 4 : base + 8], order)  # type: ignore[arg-type]
            entries = int.from_bytes(exif[directory : directory + 2], order)  # type: ignore[arg-type]
            held = min(entries, max(0, len(exif) - directory) // 12)
            at_most(MAX_STEPS, held, "entries of EXIF data")
