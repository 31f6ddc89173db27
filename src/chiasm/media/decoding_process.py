"""The process in which a Decoder decodes what may take long. Orders come on standard input, answers go to standard output.

An order is a file, and an answer the pixels as raw bytes, each after a header of fixed size. The process ends with its input.
"""

from __future__ import annotations

import enum
import math
import signal
import struct
import sys

ORDER = "<QQd"
"""Bytes of the file that follows, the greatest number of pixels, and the seconds of CPU time."""
ANSWER = "<BLLQ"
"""Outcome, width, height, and the bytes that follow: the pixels row by row, or a message."""


class Outcome(enum.IntEnum):
    """How decoding ended."""

    DECODED = 0
    TOO_LARGE = 1
    INVALID = 2


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
        outcome, width, height, content = _decode(data, max_pixels)
        target.write(struct.pack(ANSWER, outcome, width, height, len(content)) + content)
        target.flush()


def _decode(data: bytes, max_pixels: int) -> tuple[Outcome, int, int, bytes]:
    from chiasm.errors import Code, MediaError
    from chiasm.media.config import MediaConfig
    from chiasm.media.image import decode

    try:
        image = decode(data, MediaConfig(max_image_pixels=max_pixels))
    except MediaError as error:
        outcome = Outcome.TOO_LARGE if error.code == Code.IMAGE_TOO_LARGE else Outcome.INVALID
        return outcome, 0, 0, error.message.encode()
    return Outcome.DECODED, image.width, image.height, image.tobytes()


if __name__ == "__main__":
    main()
