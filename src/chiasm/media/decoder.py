"""Decodes images without letting one of them take longer than its size warrants.

For most files the header bounds the work: so many pixels, so many scans. They are decoded in a thread, which costs nothing
extra. For the others (a TIFF, an AVIF, an animation, a JPEG of many scans) it doesn't, and a thread can't be stopped. So they
are decoded in a process that has limits of CPU time and memory, which the kernel enforces. It waits for the next file when it
is done.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import IO, NamedTuple, TypeVar

from PIL import Image

from chiasm.errors import Code, MediaError
from chiasm.media.config import MediaConfig
from chiasm.media.decoding_process import ANSWER, ORDER, Outcome
from chiasm.media.image import decode_quickly

_T = TypeVar("_T")
_PIXELS = 10_000_000
_GRACE = 10
"""Of real time, a process gets so many times its CPU time before it is killed; other processes may take the cores."""
_STUCK_SECONDS = 60.0
_PIPE_BYTES = 1 << 20
"""The most that Linux gives to anybody; the larger, the fewer switches between the two processes."""


class _Answer(NamedTuple):
    outcome: Outcome
    width: int
    height: int
    content: bytes
    seconds: float


class Decoder:
    """Decodes for one instance, on its event loop. The process starts with the first file that needs it."""

    def __init__(self, config: MediaConfig) -> None:
        self._config = config
        self._apart = ThreadPoolExecutor(1, "chiasm-decode")
        self._process: subprocess.Popen[bytes] | None = None
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
        if (process := self._process) is not None:
            process.kill()
        self._apart.shutdown()
        self._end()

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
        answer = self._ask(data, max_pixels, cpu_seconds)
        if answer is None:
            return self._raise_for_end(cpu_seconds)
        if answer.outcome is Outcome.TOO_EXPENSIVE:
            raise _too_expensive("memory than the limit for its size")
        if answer.outcome is not Outcome.DECODED:
            code = Code.IMAGE_TOO_LARGE if answer.outcome is Outcome.TOO_LARGE else Code.INVALID_IMAGE
            raise MediaError(answer.content.decode(), code=code)
        return Image.frombytes("RGB", (answer.width, answer.height), answer.content), answer.seconds

    def _ask(self, data: bytes, max_pixels: int, cpu_seconds: float) -> _Answer | None:
        """Return what the process answers; None if it ends instead."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "chiasm.media.decoding_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # libraries write a line for each broken strip of a TIFF
                pipesize=_PIPE_BYTES,
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        watchdog = threading.Timer(_GRACE * (cpu_seconds + 1), process.kill)
        watchdog.start()
        started = time.monotonic()
        try:
            process.stdin.write(struct.pack(ORDER, len(data), max_pixels, cpu_seconds) + data)
            process.stdin.flush()
            outcome, width, height, size = struct.unpack(ANSWER, _read(process.stdout, struct.calcsize(ANSWER)))
            content = _read(process.stdout, size)
        except (OSError, EOFError):
            return None
        finally:
            watchdog.cancel()
        return _Answer(Outcome(outcome), width, height, content, time.monotonic() - started)

    def _raise_for_end(self, cpu_seconds: float) -> tuple[Image.Image, float]:
        if self._end() in (-signal.SIGXCPU, -signal.SIGKILL):
            raise _too_expensive(f"than {cpu_seconds:.1f} s, the limit for its size")
        raise MediaError("The image is corrupt.", code=Code.INVALID_IMAGE)

    def _end(self) -> int | None:
        """Forget the process, and return its exit code."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.kill()  # does nothing if it has ended
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):  # of what it hasn't read
                pipe.close()  # type: ignore[union-attr]
        return process.wait()


def _too_expensive(what: str) -> MediaError:
    return MediaError(
        f"Decoding the image takes more {what}. Save it again with another program.", code=Code.IMAGE_TOO_EXPENSIVE
    )


def _timed(use: Callable[[Image.Image], _T], image: Image.Image) -> tuple[_T, float]:
    started = time.monotonic()
    return use(image), time.monotonic() - started


def _read(file: IO[bytes], size: int) -> bytes:
    """Return exactly so many bytes. Raises EOFError."""
    data = file.read(size)
    if len(data) < size:
        raise EOFError
    return data
