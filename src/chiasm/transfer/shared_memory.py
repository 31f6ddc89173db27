"""The data plane for processes of one host: a reader maps the holder's memory file, and copies straight from it.

The bytes are copied once, from the holder's memory to their place in the reader's. Reading is enforced by nothing but the
operating system: who may map the file, a process of the same user, may read all of it.
"""

from __future__ import annotations

import ctypes
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
from chiasm.transfer.memory_file import FileDescription, MappedFile, MemoryFile

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
        self._file = MappedFile(offered.file)
        if not 0 <= offered.offset_bytes <= offered.offset_bytes + offered.num_bytes <= self._file.num_bytes:
            self._file.close()
            raise TransferError("it offers bytes outside its memory")
        self._memory = memory
        self._num_bytes = offered.num_bytes
        self._source: int = self._file.address + offered.offset_bytes

    def read(self, runs: Sequence[Run], stop: Callable[[], bool]) -> bool:
        source, target, unchecked = self._source, self._memory.address, 0
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
                unchecked += size
        return not stop()

    def close(self) -> None:
        self._file.close()
