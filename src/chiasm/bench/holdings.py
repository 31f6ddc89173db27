"""What a process holds of the machine: memory, descriptors, threads and shared memory."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

import psutil

RESIDENT, DESCRIPTORS, THREADS, SHARED = "resident memory", "descriptors", "threads", "shared memory"
_BLOCK_BYTES = 512
"""The unit of ``st_blocks``."""
_MEMORY_FILE = "/memfd:"
SHARED_FOLDER = Path("/dev/shm")


def held_by(pid: int) -> dict[str, float]:
    """Return what a process and its children hold, by name: bytes or counts. Shared memory is that of memory files (Linux).

    Raises psutil.Error if there is no such process.
    """
    process = psutil.Process(pid)
    found = dict.fromkeys((RESIDENT, DESCRIPTORS, THREADS), 0.0)
    files: dict[tuple[int, int], int] = {}
    for one in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess) if one is not process else contextlib.nullcontext():
            found[RESIDENT] += one.memory_info().rss
            found[DESCRIPTORS] += one.num_fds()
            found[THREADS] += one.num_threads()
            files.update(_memory_files(one.pid))
    if SHARED_FOLDER.is_dir():
        found[SHARED] = float(sum(files.values()))
    return found


def shared_folder_bytes() -> float | None:
    """Return what all processes of this machine have in /dev/shm, also in files without a name; None if there is none."""
    if not SHARED_FOLDER.is_dir():
        return None
    status = os.statvfs(SHARED_FOLDER)
    return float((status.f_blocks - status.f_bfree) * status.f_frsize)


def listeners() -> Mapping[int, int]:
    """Return the processes of this user that listen on this machine: process ids by TCP port."""
    found: dict[int, int] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            for one in process.net_connections(kind="tcp"):
                if one.status == psutil.CONN_LISTEN:
                    found[one.laddr.port] = process.pid
    return found


def pid_at(url: str, known: Mapping[int, int]) -> int | None:
    """Return the process that listens at a URL of this machine, of those that ``listeners`` found."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return known.get(port) if is_here(parts.hostname or "") else None


def is_here(host: str) -> bool:
    """Return whether a host name is that of this machine."""
    with contextlib.suppress(OSError):
        here = {one.address for addresses in psutil.net_if_addrs().values() for one in addresses}
        return any(str(address[0]) in here for *_, address in socket.getaddrinfo(host, None))
    return False


def _memory_files(pid: int) -> Iterator[tuple[tuple[int, int], int]]:
    """Yield the memory files that a process has open, each with the bytes that it takes."""
    with contextlib.suppress(OSError):
        for path in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if os.readlink(path).startswith(_MEMORY_FILE):
                    status = path.stat()
                    yield (status.st_dev, status.st_ino), _BLOCK_BYTES * status.st_blocks
