"""A memory file: memory of one process that others of its host can map, and that is in no folder.

It disappears with the last process that has it mapped, however that process ends. Others open it through the ``/proc`` of the
process that made it. It is sealed against truncation, so nothing that happens to that process can kill those that read it. The
token at its end is locked as long as that process offers it. Once it isn't, those that use a part of the file in place, and
have that locked, can free the rest: otherwise the least of it would keep all in memory.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import secrets
import stat
import struct
from pathlib import Path

import msgspec
import numpy as np

from chiasm.errors import ConfigurationError
from chiasm.transfer.errors import TransferError

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_TOKEN_BYTES = 32
_FLOCK = struct.Struct("@hhqqi4x")
"""``struct flock`` of Linux on 64 bits: type, whence, start, length, pid."""
_PUNCH_HOLE = 0x01 | 0x02
"""Of fallocate(2): free a part of a file, which keeps its size."""
_ELSEWHERE = (
    "its memory cannot be mapped here, because it runs on another host, in another container or as another user"
)


class FileDescription(msgspec.Struct, frozen=True):
    """Where a memory file is. The file ends with ``token``, and no other file does."""

    boot_id: str
    pid: int
    descriptor: int
    size_bytes: int
    token: bytes


class MemoryFile:
    """Zeroed memory that other processes can map. Raises ConfigurationError if it can't be had."""

    def __init__(self, num_bytes: int, name: str) -> None:
        """``name`` is what tools such as ``pmap`` show."""
        if not hasattr(os, "memfd_create"):
            raise ConfigurationError("Memory that other processes can map needs Linux; use NixlConnector.")
        end = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        size, token = end + _TOKEN_BYTES, secrets.token_bytes(_TOKEN_BYTES)
        try:
            self.descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise ConfigurationError(f"Cannot create shared memory: {error}.") from error
        try:
            os.ftruncate(self.descriptor, size)
            os.pwrite(self.descriptor, token, end)
            # Sealed, so that it cannot be truncated: reading it would then kill the processes that map it.
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self._token = end
            set_lock(self.descriptor, fcntl.F_RDLCK, self._token, _TOKEN_BYTES)
            mapped = mmap.mmap(self.descriptor, size)
        except (OSError, ValueError, OverflowError) as error:
            os.close(self.descriptor)
            raise ConfigurationError(f"Cannot create {num_bytes} bytes of shared memory: {error}.") from error
        self.num_bytes = num_bytes
        self.buffer = memoryview(mapped)[:num_bytes]
        """The bytes. They stay while this or anything made from it exists, also after ``close``."""
        self.address: int = np.frombuffer(self.buffer, np.uint8).ctypes.data
        self.description = FileDescription(_boot_id(), os.getpid(), self.descriptor, size, token)

    def offer_no_more(self) -> None:
        """Let those who have the file mapped free what nobody has locked. This process uses it no more. Idempotent."""
        if self.descriptor >= 0:
            set_lock(self.descriptor, fcntl.F_UNLCK, self._token, _TOKEN_BYTES)

    def close(self) -> None:
        """Let nobody map the file from now on. Those who have it mapped keep it. Idempotent."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class MappedFile:
    """A memory file of another process, mapped for reading. Raises TransferError if it can't be, or is another file.

    ``is_written``: it is mapped for writing too.
    """

    def __init__(self, description: FileDescription, *, is_written: bool = False) -> None:
        if description.boot_id != _boot_id():
            raise TransferError(_ELSEWHERE)
        try:
            path = f"/proc/{description.pid}/fd/{description.descriptor}"
            mode = os.O_RDWR if is_written else os.O_RDONLY
            descriptor = os.open(path, mode | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise TransferError(f"{_ELSEWHERE} ({error})") from error
        try:
            mapped = _map(descriptor, description, mmap.PROT_READ | (mmap.PROT_WRITE if is_written else 0))
        except BaseException:
            os.close(descriptor)
            raise
        self.description = description
        self.descriptor = descriptor
        self.num_bytes = description.size_bytes - _TOKEN_BYTES
        self.buffer = memoryview(mapped)[: self.num_bytes]
        """The bytes. They stay while this or anything made from it exists, also after ``close``."""
        self.address: int = np.frombuffer(self.buffer, np.uint8).ctypes.data

    def reopen(self) -> int:
        """Return a new descriptor of the file, with locks of its own. Raises TransferError if there can't be one."""
        try:
            return os.open(f"/proc/self/fd/{self.descriptor}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise TransferError(f"its memory cannot be opened again: {error}") from error

    def free_the_rest(self) -> bool:
        """Free what nobody has locked, unless the process that made the file still offers it. Return whether it is free."""
        try:
            descriptor = os.open(f"/proc/self/fd/{self.descriptor}", os.O_RDWR | os.O_CLOEXEC)
            try:
                is_offered = find_lock(descriptor, self.num_bytes, _TOKEN_BYTES) is not None
                return not is_offered and _free_unlocked(descriptor, self.num_bytes)
            finally:
                os.close(descriptor)
        except OSError:
            return False

    def close(self) -> None:
        """Close the file. It stays mapped as long as something refers to ``buffer``. Idempotent."""
        self.buffer = memoryview(b"")
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def set_lock(descriptor: int, kind: int, begin: int, size: int) -> None:
    """Lock a range of a file for this descriptor (``fcntl.F_RDLCK``, ``F_WRLCK``), or unlock it (``F_UNLCK``).

    Raises BlockingIOError if somebody else has locked some of it. Open file description locks belong to the open file, not to
    the process: those that share a descriptor, by dup or fork, share its locks, and closing the last one ends them.
    """
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, begin, size, 0))


def find_lock(descriptor: int, begin: int, size: int) -> tuple[int, int] | None:
    """Return begin and size of a lock that somebody else has on some of the range; size 0 is to the end of the file."""
    answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, begin, size, 0))
    kind, _, start, length, _ = _FLOCK.unpack(answer)
    return None if kind == fcntl.F_UNLCK else (start, length)


def _free_unlocked(descriptor: int, num_bytes: int) -> bool:
    """Free all pages of a file in which nobody has locked anything. Return whether the system did so. Raises OSError."""
    libc = ctypes.CDLL(None)  # calls without Python's lock: many pages take a while
    libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    ranges = [(0, num_bytes // mmap.PAGESIZE * mmap.PAGESIZE)]
    is_free = True
    while ranges:
        begin, end = ranges.pop()
        if begin >= end:
            continue
        try:
            set_lock(descriptor, fcntl.F_WRLCK, begin, end - begin)  # until the descriptor is closed
        except BlockingIOError:
            start, size = find_lock(descriptor, begin, end - begin) or (end, 1)
            after = -(-(start + size) // mmap.PAGESIZE) * mmap.PAGESIZE if size else end
            ranges += [(begin, min(end, start // mmap.PAGESIZE * mmap.PAGESIZE)), (after, end)]
        else:
            is_free = libc.fallocate(descriptor, _PUNCH_HOLE, begin, end - begin) == 0 and is_free
    return is_free


def _map(descriptor: int, description: FileDescription, protection: int) -> mmap.mmap:
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size != description.size_bytes:
            raise TransferError(_ELSEWHERE)
        if os.pread(descriptor, _TOKEN_BYTES, description.size_bytes - _TOKEN_BYTES) != description.token:
            raise TransferError(_ELSEWHERE)
        if not fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise TransferError("its memory is not sealed, and could be truncated while it is read")
        return mmap.mmap(descriptor, description.size_bytes, mmap.MAP_SHARED, protection)
    except (OSError, ValueError, OverflowError) as error:
        raise TransferError(f"its memory cannot be mapped: {error}") from error


def _boot_id() -> str:
    return _BOOT_ID.read_text().strip()
