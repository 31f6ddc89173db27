"""The data plane for processes of one host: a reader maps the holder's memory file, once, and reads straight from it.

``read`` copies bytes to their place in the reader's memory. ``hold`` copies nothing: the reader uses the holder's bytes where
they are, and a lock on their range keeps the holder from using it again, also if the connection between the two is lost.
Nothing but the operating system says who may read: a process of the same user, all of the file.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
from collections.abc import Callable, Sequence

import msgspec

from chiasm.transfer.errors import TransferError
from chiasm.transfer.memory import (
    DataPlane,
    Memory,
    OfferedMemory,
    Peer,
    ReachedMemory,
    Run,
    check_host_memory,
    check_remote,
    read_description,
)
from chiasm.transfer.memory_file import FileDescription, MappedFile, MemoryFile, set_lock

BYTES_BETWEEN_CHECKS = 8 << 20


class _Description(msgspec.Struct, frozen=True):
    """The part of a memory file that is offered."""

    file: FileDescription
    offset_bytes: int
    num_bytes: int


class SharedMemoryPlane(DataPlane):
    """Moves bytes in host memory between processes of one host, one user and one pid namespace."""

    needs_file = True

    def __init__(self, device: str = "cpu") -> None:
        """``device`` is where the memory is that will be offered or written to."""
        check_host_memory(device, "shared memory")

    def offer(self, memory: Memory) -> OfferedMemory:
        assert memory.file is not None
        return _OfferedFile(memory.file, memory)

    def reach(self, peer: Peer, description: bytes, memory: Memory) -> SharedMemory:
        return SharedMemory(description, memory)


class _OfferedFile(OfferedMemory):
    def __init__(self, file: MemoryFile, memory: Memory) -> None:
        self._file = file
        self._description = msgspec.msgpack.encode(_Description(file.description, memory.file_offset, memory.num_bytes))

    def describe(self, reader: int) -> bytes:
        return self._description

    def close(self) -> None:
        self._file.close()


class SharedMemory(ReachedMemory):
    """A holder's file, mapped for reading, and this reader's memory."""

    def __init__(self, description: bytes, memory: Memory) -> None:
        offered = read_description(description, _Description)
        self.file = MappedFile(offered.file)
        if not 0 <= offered.offset_bytes <= offered.offset_bytes + offered.num_bytes <= self.file.num_bytes:
            self.file.close()
            raise TransferError("it offers bytes outside its memory")
        self._memory = memory
        self._num_bytes = offered.num_bytes
        self.file_offset = offered.offset_bytes
        """Where the offered memory begins in ``file``."""
        self._source: int = self.file.address + offered.offset_bytes

    def read(
        self, runs: Sequence[Run], stop: Callable[[], bool], received: Callable[[int], None] = lambda num_bytes: None
    ) -> bool:
        source, target, unchecked = self._source, self._memory.address, BYTES_BETWEEN_CHECKS
        for run in runs:
            check_remote(run, self._num_bytes)
            for done in range(0, run.num_bytes, BYTES_BETWEEN_CHECKS):
                size = min(run.num_bytes - done, BYTES_BETWEEN_CHECKS)
                if unchecked + size > BYTES_BETWEEN_CHECKS:
                    if stop():
                        return False
                    unchecked = 0
                # memmove releases the GIL.
                ctypes.memmove(target + run.local + done, source + run.remote + done, size)
                received(size)
                unchecked += size
        return not stop()

    def hold(self, offset: int, num_bytes: int) -> HeldRange | None:
        """Return a range of the holder's memory for use in place; None if the holder is writing there, so what was is gone.

        The bytes don't change until the range is released, but whether they are the right ones only their checksum says: the
        lock may have come after the holder had put something else there. Any thread.
        """
        check_remote(Run(0, offset, num_bytes), self._num_bytes)
        begin = self.file_offset + offset
        descriptor = self.file.reopen()
        try:
            set_lock(descriptor, fcntl.F_RDLCK, begin, num_bytes)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        return HeldRange(descriptor, self.file.buffer[begin : begin + num_bytes])

    def close(self) -> None:
        self.file.close()


class HeldRange:
    """Bytes of a holder, which stay as they are until ``release``. They remain mapped while anything refers to ``buffer``.

    Each has a descriptor of its own, since closing it is the one way to end a lock that a finalizer can take at any moment.
    """

    def __init__(self, descriptor: int, buffer: memoryview) -> None:
        self.descriptor = descriptor
        """Of the holder's file; -1 once it is released."""
        self.buffer = buffer
        """Read only."""

    def release(self) -> None:
        """Let the holder use the range again. Any thread, and also from finalizers; idempotent."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
