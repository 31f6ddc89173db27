"""Decodes images without letting one of them take longer than its size warrants.

For most files the header bounds the work: so many pixels, so many scans. They are decoded in a thread, which costs nothing
extra. For the others (a TIFF, an AVIF, an animation, a JPEG of many scans) it doesn't, and a thread can't be stopped. So they
are decoded in a process that has limits of CPU time and memory (``chiasm.bounded_process``).
"""

from __future__ import annotations

import asyncio
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import TypeVar

from PIL import Image

from chiasm.bounded_process import BoundedProcess, ProcessEndedError
from chiasm.errors import Code, MediaError
from chiasm.media.config import MediaConfig
from chiasm.media.decoding_process import ANSWER, ORDER, Outcome
from chiasm.media.image import decode_quickly

_T = TypeVar("_T")
_PIXELS = 10_000_000
_STUCK_SECONDS = 60.0


class Decoder:
    """Decodes for one instance, on its event loop. The process starts with the first file that needs it."""

    def __init__(self, config: MediaConfig) -> None:
        self._config = config
        self._apart = ThreadPoolExecutor(1, "chiasm-decode")
        self._process = BoundedProcess("-m", "chiasm.media.decoding_process")
        self._quick: dict[int, float] = {}
        """When the threads that decode now have begun, by the number of the thread."""

    async def decode(
        self, data: bytes, max_pixels: int, use: Callable[[Image.Image], _T], threads: Executor
    ) -> tuple[_T, float]:
        """Decode an image and call ``use`` with it, in one of ``threads``; return its result and the seconds that both took.

        Images that need the process are decoded one at a time, and keep none of ``threads`` busy meanwhile. Raises what
        ``media.image.decode`` raises, and MediaError for an image that takes too long.
        """
        loop = asyncio.get_running_loop()
        done = await loop.run_in_executor(threads, self._decode_quickly, data, max_pixels, use)
        if done is not None:
            return done
        image, decode_seconds = await loop.run_in_executor(self._apart, self._decode_apart, data, max_pixels)
        result, seconds = await loop.run_in_executor(threads, _timed, use, image)
        return result, decode_seconds + seconds

    @property
    def is_stuck(self) -> bool:
        """Whether an image has kept a thread busy for a minute, which none should."""
        return any(time.monotonic() - began > _STUCK_SECONDS for began in list(self._quick.values()))

    def close(self) -> None:
        """End the process. Idempotent."""
        self._apart.shutdown(wait=False, cancel_futures=True)
        self._process.kill()
        self._apart.shutdown()
        self._process.end()

    def _decode_quickly(
        self, data: bytes, max_pixels: int, use: Callable[[Image.Image], _T]
    ) -> tuple[_T, float] | None:
        started = self._quick[threading.get_ident()] = time.monotonic()
        try:
            image = decode_quickly(data, MediaConfig(max_image_pixels=max_pixels))
            return None if image is None else (use(image), time.monotonic() - started)
        finally:
            del self._quick[threading.get_ident()]

    def _decode_apart(self, data: bytes, max_pixels: int) -> tuple[Image.Image, float]:
        cpu_seconds = self._config.decode_cpu_seconds * (1 + max_pixels / _PIXELS / 2)
        started = time.monotonic()
        try:
            answer = self._process.ask(struct.pack(ORDER, max_pixels), data, cpu_seconds=cpu_seconds)
        except ProcessEndedError as error:
            if error.took_too_long:
                raise _too_expensive(f"than {cpu_seconds:.1f} s, the limit for its size") from None
            raise MediaError("The image is corrupt.", code=Code.INVALID_IMAGE) from None
        seconds = time.monotonic() - started
        outcome, width, height = struct.unpack_from(ANSWER, answer)
        content = memoryview(answer)[struct.calcsize(ANSWER) :]
        if outcome == Outcome.TOO_EXPENSIVE:
            raise _too_expensive("memory than the limit for its size")
        if outcome != Outcome.DECODED:
            code = Code.IMAGE_TOO_LARGE if outcome == Outcome.TOO_LARGE else Code.INVALID_IMAGE
            raise MediaError(bytes(content).decode(), code=code)
        return Image.frombytes("RGB", (width, height), content), seconds


def _too_expensive(what: str) -> MediaError:
    return MediaError(
        f"Decoding the image takes more {what}. Save it again with another program.", code=Code.IMAGE_TOO_EXPENSIVE
    )


def _timed(use: Callable[[Image.Image], _T], image: Image.Image) -> tuple[_T, float]:
    started = time.monotonic()
    return use(image), time.monotonic() - started
