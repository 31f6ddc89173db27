"""Has the C library keep the memory of large bodies for the next ones."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8


def recycle_large_buffers(kept_bytes: int = 16 << 20, arenas: int = 2) -> None:
    """Take large buffers from the heap, and keep up to ``kept_bytes`` of it when they are freed.

    By default glibc maps each buffer above 128 KiB anew, and the page faults of a 1 MB image's few copies cost several
    times what the copies cost. Does nothing where the C library isn't glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, 32 << 20)
    mallopt(_M_TRIM_THRESHOLD, kept_bytes)
    mallopt(_M_ARENA_MAX, arenas)
