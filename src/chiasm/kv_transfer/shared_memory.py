"""The connector for instances of one host: a consumer maps the producer's KV cache and copies blocks straight from it.

A producer's KV cache is an anonymous file of shared memory, which is in no folder: it disappears with the last process that
has it mapped, however that process ends. A consumer opens it through the producer's ``/proc``. Each block is copied once, on a
transfer thread, from the producer's memory to its place in the consumer's.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import torch

from chiasm.errors import ConfigurationError
from chiasm.kv_transfer.base import KVConnectorRole, KVTransferConfig, OfferedMemory, ReachedMemory, TransferError
from chiasm.kv_transfer.control import Welcome
from chiasm.kv_transfer.pull import PullConnector
from chiasm.wire import UNREADABLE

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_TOKEN_BYTES = 32
_BYTES_BETWEEN_CHECKS = 8 << 20
_ELSEWHERE = (
    "its memory cannot be mapped here, because it runs on another host, in another container or as another user; "
    "use NixlConnector between the two"
)


class _Description(msgspec.Struct, frozen=True):
    """Where a producer's blocks are. The file ends with ``token``, and no other file does."""

    boot_id: str
    pid: int
    descriptor: int
    size_bytes: int
    offset_bytes: int
    token: bytes


class Run(NamedTuple):
    """Blocks that are adjacent on both sides: ``num_blocks`` of them, from ``remote`` on, to ``local``."""

    local: int
    remote: int
    num_blocks: int


def runs(local: Sequence[int], remote: Sequence[int], longest: int) -> Iterator[Run]:
    """Join pairs of blocks, in order, where they are adjacent. No run has more than ``longest`` blocks (at least 1)."""
    start, count = 0, 0
    for index in range(len(local)):
        adjacent = count and local[index] == local[start] + count and remote[index] == remote[start] + count
        if adjacent and count < longest:
            count += 1
            continue
        if count:
            yield Run(local[start], remote[start], count)
        start, count = index, 1
    if count:
        yield Run(local[start], remote[start], count)


class SharedMemoryConnector(PullConnector):
    """Moves blocks in host memory between processes of one host, one user and one pid namespace.

    Raises ConfigurationError on systems other than Linux, and for other devices than the CPU.
    """

    def __init__(self, config: KVTransferConfig, role: KVConnectorRole) -> None:
        super().__init__(config, role)
        if torch.device(config.device).type != "cpu":
            raise ConfigurationError(
                f"SharedMemoryConnector moves KV in host memory, and the KV cache is on {config.device}; use NixlConnector."
            )
        if not hasattr(os, "memfd_create"):
            raise ConfigurationError("SharedMemoryConnector needs Linux; use NixlConnector.")
        self._file: _SharedFile | None = None
        self._blocks: torch.Tensor | None = None

    def allocate_kv_cache(self, num_bytes: int) -> torch.Tensor | None:
        if not self.is_producer:
            return None
        self._file = _SharedFile(num_bytes)
        return self._file.memory

    def offer(self, blocks: torch.Tensor) -> OfferedMemory:
        if self._file is None or not self._file.holds(blocks):
            raise ConfigurationError("The KV cache must lie in the memory that allocate_kv_cache returned.")
        file, self._file = self._file, None
        return _SharedBlocks(file, blocks)

    def prepare(self, blocks: torch.Tensor) -> None:
        self._blocks = blocks

    def reach(self, welcome: Welcome) -> ReachedMemory:
        assert self._blocks is not None
        return _MappedBlocks(self._blocks, welcome)

    def close_memory(self) -> None:
        self._blocks = None
        if self._file is not None:
            self._file.close()
            self._file = None


class _SharedFile:
    """Memory that other processes can map, given the id of this process and a descriptor."""

    def __init__(self, num_bytes: int) -> None:
        end = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self.size_bytes = end + _TOKEN_BYTES
        self.token = secrets.token_bytes(_TOKEN_BYTES)
        try:
            self.descriptor = os.memfd_create("chiasm-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise ConfigurationError(f"Cannot create shared memory for the KV cache: {error}.") from error
        try:
            os.ftruncate(self.descriptor, self.size_bytes)
            os.pwrite(self.descriptor, self.token, end)
            # Sealed, so that it cannot be truncated: reading it would then kill the processes that map it.
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            mapped = mmap.mmap(self.descriptor, self.size_bytes)
        except (OSError, ValueError, OverflowError) as error:
            os.close(self.descriptor)
            raise ConfigurationError(
                f"Cannot create {num_bytes} bytes of shared memory for the KV cache: {error}."
            ) from error
        self.memory = torch.frombuffer(mapped, dtype=torch.uint8, count=num_bytes)

    def offset_of(self, blocks: torch.Tensor) -> int:
        return blocks.data_ptr() - self.memory.data_ptr()

    def holds(self, blocks: torch.Tensor) -> bool:
        return 0 <= self.offset_of(blocks) <= self.memory.nbytes - blocks.nbytes

    def close(self) -> None:
        """Let nobody map the file from now on. Those who have it mapped keep it."""
        os.close(self.descriptor)


class _SharedBlocks(OfferedMemory):
    def __init__(self, file: _SharedFile, blocks: torch.Tensor) -> None:
        self._file = file
        self._offset_bytes = file.offset_of(blocks)

    def description(self) -> bytes:
        description = _Description(
            boot_id=_BOOT_ID.read_text().strip(),
            pid=os.getpid(),
            descriptor=self._file.descriptor,
            size_bytes=self._file.size_bytes,
            offset_bytes=self._offset_bytes,
            token=self._file.token,
        )
        return msgspec.msgpack.encode(description)

    def close(self) -> None:
        self._file.close()


class _MappedBlocks(ReachedMemory):
    """A producer's file, mapped for reading, and this consumer's blocks."""

    def __init__(self, blocks: torch.Tensor, welcome: Welcome) -> None:
        try:
            description = msgspec.msgpack.decode(welcome.memory, type=_Description)
        except UNREADABLE as error:
            raise TransferError(f"the description of its memory is not understood: {error}") from error
        self._block_bytes = blocks.shape[1]
        end = description.offset_bytes + welcome.num_blocks * self._block_bytes
        if description.offset_bytes < 0 or end > description.size_bytes - _TOKEN_BYTES:
            raise TransferError("it offers blocks outside its memory")
        self._blocks = blocks  # keeps them in memory
        self._mapped = _map(description)
        array = np.frombuffer(self._mapped, dtype=np.uint8)
        self._remote_address: int = array.ctypes.data + description.offset_bytes
        self._local_address: int = blocks.data_ptr()

    def read(self, local: Sequence[int], remote: Sequence[int], stop: Callable[[], bool]) -> bool:
        block_bytes, source, target = self._block_bytes, self._remote_address, self._local_address
        unchecked = 0
        for run in runs(local, remote, max(1, _BYTES_BETWEEN_CHECKS // block_bytes)):
            size = run.num_blocks * block_bytes
            if unchecked + size > _BYTES_BETWEEN_CHECKS:
                if stop():
                    return False
                unchecked = 0
            # memmove releases the GIL.
            ctypes.memmove(target + run.local * block_bytes, source + run.remote * block_bytes, size)
            unchecked += size
        return not stop()

    def close(self) -> None:
        self._mapped.close()


def _map(description: _Description) -> mmap.mmap:
    """Map a producer's file for reading. Raises TransferError if it can't be opened or is another file."""
    if description.boot_id != _BOOT_ID.read_text().strip():
        raise TransferError(_ELSEWHERE)
    try:
        path = f"/proc/{description.pid}/fd/{description.descriptor}"
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise TransferError(f"{_ELSEWHERE} ({error})") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size != description.size_bytes:
            raise TransferError(_ELSEWHERE)
        if os.pread(descriptor, _TOKEN_BYTES, description.size_bytes - _TOKEN_BYTES) != description.token:
            raise TransferError(_ELSEWHERE)
        if not fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise TransferError("its memory is not sealed, and could be truncated while it is read")
        return mmap.mmap(descriptor, description.size_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
    except (OSError, ValueError, OverflowError) as error:
        raise TransferError(f"its memory cannot be mapped: {error}") from error
    finally:
        os.close(descriptor)
