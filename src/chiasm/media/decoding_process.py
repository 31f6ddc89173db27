"""The process in which a Decoder decodes what may take long. Orders come on standard input, answers go to standard output.

An order is a file, and an answer the pixels as raw bytes, each after a header of fixed size. The process ends with its input.
Its CPU time and its memory are limited, and what libraries write to standard error is thrown away.
"""

from __future__ import annotations

import enum
import math
import os
import signal
import struct
import sys
from types import ModuleType

ORDER = "<QQd"
"""Bytes of the file that follows, the greatest number of pixels, and the seconds of CPU time."""
ANSWER = "<BLLQ"
"""Outcome, width, height, and the bytes that follow: the pixels row by row, or a message."""


_BYTES_PER_PIXEL = 48
"""Decoding has several copies of the pixels in memory, of up to 8 bytes each, and converts them."""
_BYTES_BESIDE = 192 << 20
_BYTES_PER_CORE = 16 << 20
"""The library for AVIF begins a thread for each core."""


class Outcome(enum.IntEnum):
    """How decoding ended."""

    DECODED = 0
    TOO_LARGE = 1
    INVALID = 2
    TOO_EXPENSIVE = 3
    """It needs more memory than the limit."""


def main() -> None:
    """Decode file after file."""
    import resource
    import time

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the instance, which ends this process when it is done
    source, target = sys.stdin.buffer, sys.stdout.buffer
    _, hard_limit = resource.getrlimit(resource.RLIMIT_CPU)
    while len(header := source.read(struct.calcsize(ORDER))) == struct.calcsize(ORDER):
        size, max_pixels, cpu_seconds = struct.unpack(ORDER, header)
        data = source.read(size)
        limit = math.ceil(time.process_time() + cpu_seconds)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, hard_limit))  # beyond it the kernel ends the process
        _limit_memory(resource, size * 2 + max_pixels * _BYTES_PER_PIXEL)
        outcome, width, height, content = _decode(data, max_pixels)
        target.write(struct.pack(ANSWER, outcome, width, height, len(content)) + content)
        target.flush()


def _limit_memory(resource: ModuleType, more_bytes: int) -> None:
    """Allow so much more memory than the process has now, beside that of libraries. Only Linux counts it."""
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            data_pages = int(file.read().split()[5])
        _, hard_limit = resource.getrlimit(resource.RLIMIT_DATA)
        beside_bytes = _BYTES_BESIDE + _BYTES_PER_CORE * (os.cpu_count() or 1)
        limit = data_pages * os.sysconf("SC_PAGE_SIZE") + more_bytes + beside_bytes
        limit = limit if hard_limit == resource.RLIM_INFINITY else min(limit, hard_limit)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard_limit))


def _decode(data: bytes, max_pixels: int) -> tuple[Outcome, int, int, bytes]:
    from chiasm.errors import Code, MediaError
    from chiasm.media.config import MediaConfig
    from chiasm.media.image import decode

    try:
        image = decode(data, MediaConfig(max_image_pixels=max_pixels))
    except MediaError as error:
        cause = error.__cause__
        if isinstance(cause, MemoryError) or "out of memory" in str(cause):  # Pillow raises an OSError
            return Outcome.TOO_EXPENSIVE, 0, 0, b""
        outcome = Outcome.TOO_LARGE if error.code == Code.IMAGE_TOO_LARGE else Outcome.INVALID
        return outcome, 0, 0, error.message.encode()
    return Outcome.DECODED, image.width, image.height, image.tobytes()


if __name__ == "__main__":
    main()
