"""A process that carries out one order after another, each with limits of CPU time and memory that the kernel enforces.

It is for libraries that may take minutes or gigabytes for what a client sent, or crash. A thread in one of them can't be
stopped; this process ends in place of its parent, and the next order starts a new one.

Orders come on standard input and answers go to standard output, each as raw bytes after a header of fixed size. The process
ends with its input. What libraries write to standard error is thrown away.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import IO

_ORDER = "<Qd"
"""Bytes of the order that follows, and the seconds of CPU time that it may take."""
_ANSWER = "<Q"
"""Bytes of the answer that follows."""
_GRACE = 10
"""Of real time, an order gets so many times its CPU time before its process is killed; other processes may take the cores."""
_PIPE_BYTES = 1 << 20
"""The most that Linux gives to anybody; the larger, the fewer switches between the two processes."""
_BYTES_BESIDE = 192 << 20
"""Memory of libraries that are loaded with the first order."""
_BYTES_PER_CORE = 16 << 20
"""Some libraries begin a thread for each core."""


class ProcessEndedError(Exception):
    """The process ended before it answered, and so took all that its order may cost, or crashed."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"exit code {exit_code}")
        self.took_too_long = exit_code in (-signal.SIGXCPU, -signal.SIGKILL)


class BoundedProcess:
    """The side of the parent. The process starts with the first order. Not thread-safe, but for ``kill``."""

    def __init__(self, *arguments: str) -> None:
        """``arguments`` of Python name a program that calls ``carry_out_orders``, such as ``-m`` and a module."""
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The number of the process; None if there is none now."""
        return None if self._process is None else self._process.pid

    def ask(self, *order: bytes, cpu_seconds: float) -> bytes:
        """Return the answer to an order, which is given in parts. Blocks. Raises ProcessEndedError."""
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        watchdog = threading.Timer(_GRACE * (cpu_seconds + 1), process.kill)
        watchdog.start()
        try:
            process.stdin.write(struct.pack(_ORDER, sum(map(len, order)), cpu_seconds))
            process.stdin.writelines(order)
            process.stdin.flush()
            (size,) = struct.unpack(_ANSWER, _read(process.stdout, struct.calcsize(_ANSWER)))
            return _read(process.stdout, size)
        except (OSError, EOFError):
            raise ProcessEndedError(self.end()) from None
        finally:
            watchdog.cancel()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is not None:
            self.end()  # it was killed while it had nothing to do
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", *self._arguments],  # nothing is imported from the working directory
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pipesize=_PIPE_BYTES,
            )
        return self._process

    def kill(self) -> None:
        """Let the order that another thread waits for fail."""
        if (process := self._process) is not None:
            process.kill()

    def end(self) -> int:
        """End the process, and return its exit code; 0 if there is none. Idempotent."""
        process, self._process = self._process, None
        if process is None:
            return 0
        process.kill()  # does nothing if it has ended
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):  # of what it hasn't read
                pipe.close()  # type: ignore[union-attr]
        return process.wait()


def carry_out_orders(answer: Callable[[memoryview], Iterable[bytes]], more_bytes: Callable[[memoryview], int]) -> None:
    """Be the process: answer order after order, until the parent closes standard input.

    ``answer`` returns the parts of an answer. ``more_bytes`` says how much memory an order may take beside that of libraries.
    """
    import resource

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # as from Ctrl-C, systemd or the end of a terminal
        signal.signal(number, signal.SIG_IGN)  # they are for the instance, which ends this process when it is done
    source, target = sys.stdin.buffer, sys.stdout.buffer
    _, hard_limit = resource.getrlimit(resource.RLIMIT_CPU)
    while len(header := source.read(struct.calcsize(_ORDER))) == struct.calcsize(_ORDER):
        size, cpu_seconds = struct.unpack(_ORDER, header)
        order = memoryview(source.read(size))
        limit = math.ceil(time.process_time() + cpu_seconds)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, hard_limit))  # beyond it the kernel ends the process
        _limit_memory(resource, more_bytes(order))
        parts = list(answer(order))
        target.write(struct.pack(_ANSWER, sum(map(len, parts))))
        target.writelines(parts)
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


def _read(file: IO[bytes], size: int) -> bytes:
    """Return exactly so many bytes. Raises EOFError."""
    data = file.read(size)
    if len(data) < size:
        raise EOFError
    return data
