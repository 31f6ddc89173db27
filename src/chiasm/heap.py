"""How the C library keeps memory that was freed, for processes that need large buffers again and again."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_LARGEST_BYTES = 32 << 20
"""The largest buffer that glibc takes from the heap."""


def recycle_large_buffers(*, kept_bytes: int, arenas: int) -> None:
    """Have the C library take large buffers from the heap, and keep up to ``kept_bytes`` of it when they are freed.

    Threads share so many ``arenas``, each of which is such a heap. By default glibc maps a large buffer separately or gives
    the heap back as soon as it is free, so that each use costs a page fault for every 4 KiB: for the copies of an image,
    they cost as much as preprocessing it, and several times that on a virtual machine whose host takes free memory back.
    Does nothing if the C library isn't glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGEST_BYTES)
    mallopt(_M_TRIM_THRESHOLD, kept_bytes)
    mallopt(_M_ARENA_MAX, arenas)


def give_back() -> None:
    """Have the C library give back all of the heap that is free, also between buffers that are in use.

    glibc takes a few milliseconds for each 100 MB, in which other threads wait if they allocate. Does nothing if the C library
    isn't glibc.
    """
    try:
        malloc_trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return
    malloc_trim(0)
