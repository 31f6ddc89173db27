"""Watches the event loops of servers in this process: an operation on files there holds up all requests.

The servers run in threads; the main thread, and with it the loop of a test itself, isn't watched.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import traceback
from collections.abc import Iterator
from functools import cache

_SLOW = (
    "open",
    "fcntl.flock",
    "fcntl.lockf",
    "os.listdir",
    "os.scandir",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.truncate",
    "os.utime",
    "mmap.__new__",
    "shutil.rmtree",
    "socket.getaddrinfo",
    "subprocess.Popen",
)
"""Python's names of operations that wait for a file system, a name server or a process."""
_watches: list[list[str]] = []


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if not _watches or event not in _SLOW or asyncio._get_running_loop() is None:
        return
    if threading.current_thread() is threading.main_thread() or str(arguments[0]).startswith("/proc/"):
        return  # a test does what it likes, and the kernel's own files make nobody wait
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_stack(sys._getframe(1))]
    if any(file == traceback.__file__ or "importlib" in file or "linecache" in file for file, _ in frames):
        return  # a module is imported once, and files are read for the traceback of what must never happen
    where = [f"{file}:{line}" for file, line in frames if "/chiasm/" in file]
    for seen in _watches:
        seen.append(f"{event} {arguments[:1]} at {' < '.join(where[:3])}")


@cache
def _add_hook() -> None:
    sys.addaudithook(_hook)  # once, since it can't be taken out again


@contextlib.contextmanager
def slow_operations() -> Iterator[list[str]]:
    """A block in which slow operations on the threads of event loops are noted, each with where it happened."""
    _add_hook()
    seen: list[str] = []
    _watches.append(seen)
    try:
        yield seen
    finally:
        _watches.remove(seen)
