"""How a reader brings in the embeddings of one holder: they land in an arena of its own, or stay where they are.

Those that stay are used in the holder's memory. The reader locks the range of the holder's file before it looks for the entry
there. If it then finds the entry's header, the entry is whole and stays, because the holder clears the header before it gives
the range back, and uses no range that is locked. That holds whatever happens to the connection or to either process.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch

from chiasm.ec_transfer.device import to_device
from chiasm.ec_transfer.entry_file import EntryHeader
from chiasm.ec_transfer.entry_memory import Checksum, has_header, tensor_at
from chiasm.ec_transfer.wants import Read
from chiasm.transfer.arena import Arena, Piece
from chiasm.transfer.memory import ReachedMemory, Run
from chiasm.transfer.shared_memory import SharedMemory

MAX_LENT_SHARE = 4
"""A reader keeps at most one part in so many of a holder's memory from being reused; what is more, it copies."""


class Arrived(NamedTuple):
    """An embedding in this process, verified, on the device. The thread that uses it calls ``take_over``."""

    tensor: torch.Tensor
    seconds: float
    """How long bringing it in took."""


class EntryUnusable(Exception):
    """What was read is not the entry. ``str(error)`` is a clause; ``bad``: the holder should not offer it any more."""

    def __init__(self, reason: str, *, bad: bool) -> None:
        super().__init__(reason)
        self.bad = bad


class Source(ABC):
    """One holder's embeddings, as a reader brings them in."""

    @abstractmethod
    def bring(self, read: Read, stop: Callable[[], bool]) -> Arrived | None:
        """Return what was granted, verified; None if there is no memory for it now, or if it was stopped.

        Called on several threads. Raises EntryUnusable, and TransferError if nothing of this holder can be read any more.
        """

    def is_quick(self, read: Read) -> bool:
        """Return whether ``bring`` takes microseconds, so that another thread would take longer to begin."""
        return False

    @abstractmethod
    def close(self) -> None:
        """Release the holder's memory, as soon as nothing uses it. Called once, when nothing is read."""


class _Lent:
    """Makes tensors of memory that is lent to an engine, as long as they take no more than ``max_bytes`` together.

    Further ones are copies. So an engine, which may keep what it has for long, doesn't take all of the memory.
    """

    def __init__(self, max_bytes: int, device: str) -> None:
        self._max_bytes = max_bytes
        self._device = device
        self._is_cpu = torch.device(device).type == "cpu"
        self._lock = threading.Lock()
        self._bytes = 0
        self._returned: deque[int] = deque()
        """Sizes of tensors that are gone. The collector of garbage may run anywhere, so it takes no lock."""

    def stays(self, header: EntryHeader) -> bool:
        """Return whether an embedding needn't be copied now."""
        with self._lock:
            return self._has_room(header.data_bytes)

    def _has_room(self, size: int) -> bool:
        while self._returned:
            self._bytes -= self._returned.popleft()
        return self._is_cpu and self._bytes + size <= self._max_bytes

    def tensor(self, address: int, header: EntryHeader, owner: object, release: Callable[[], None]) -> torch.Tensor:
        """Return the embedding at ``address`` on the device. ``release`` is called when its memory isn't needed any more.

        The thread that uses what was copied to a GPU calls ``take_over``.
        """
        size = header.data_bytes
        with self._lock:
            stays = self._has_room(size)
            self._bytes += size if stays else 0

        def give_back() -> None:
            release()
            if stays:
                self._returned.append(size)

        tensor = tensor_at(address, header, owner, give_back)
        if stays:
            return tensor
        return tensor.clone() if self._is_cpu else to_device(tensor, self._device)


class Landing:
    """An arena into which embeddings come, over any number of sources.

    Up to ``num_bytes`` may arrive at the same time, and as much may be lent. ``freed`` is called, from any thread, when there
    may be room again; it must only wake somebody.
    """

    def __init__(self, num_bytes: int, device: str, freed: Callable[[], None]) -> None:
        self.arena = Arena(2 * num_bytes, "chiasm-ec-in", released=freed)
        self._lent = _Lent(num_bytes, device)

    def hand_over(self, piece: Piece, header: EntryHeader) -> torch.Tensor:
        """Return the embedding that has landed, on the device. The piece is released when it isn't needed any more."""
        address = self.arena.file.address + piece.offset
        return self._lent.tensor(address, header, self.arena.file.buffer, piece.release)


class LandingSource(Source):
    """A holder whose embeddings are copied into the landing."""

    def __init__(self, reached: ReachedMemory, landing: Landing) -> None:
        self._reached = reached
        self._landing = landing

    def bring(self, read: Read, stop: Callable[[], bool]) -> Arrived | None:
        started = time.perf_counter()
        piece = self._landing.arena.allocate(read.num_bytes)
        if piece is None:
            return None
        address = self._landing.arena.file.address + piece.offset
        checksum = Checksum(address, read.header)
        try:
            if not self._reached.read([Run(piece.offset, read.here.offset, read.num_bytes)], stop, checksum.add):
                if stop():
                    piece.release()
                    return None
                raise EntryUnusable("it is not granted any more", bad=False)
            if not has_header(address, read.header):
                raise EntryUnusable("it is another one, or torn", bad=True)
            if not checksum.is_right():
                raise EntryUnusable("its checksum is wrong", bad=True)
        except BaseException:
            piece.release()
            raise
        return Arrived(self._landing.hand_over(piece, read.header), time.perf_counter() - started)

    def close(self) -> None:
        self._reached.close()


class MappedSource(Source):
    """A holder of this host, whose embeddings are used where they are."""

    def __init__(self, memory: SharedMemory, num_bytes: int, device: str) -> None:
        """``num_bytes`` is the size of the holder's memory."""
        self._memory = memory
        self._lent = _Lent(num_bytes // MAX_LENT_SHARE, device)

    def is_quick(self, read: Read) -> bool:
        return self._lent.stays(read.header)

    def bring(self, read: Read, stop: Callable[[], bool]) -> Arrived | None:
        started = time.perf_counter()
        held = self._memory.hold(read.here.offset, read.num_bytes)
        if held is None:
            raise EntryUnusable("it was evicted", bad=False)
        address = self._memory.file.address + self._memory.file_offset + read.here.offset
        if not has_header(address, read.header):
            held.release()
            raise EntryUnusable("it was evicted", bad=False)
        tensor = self._lent.tensor(address, read.header, held.buffer, held.release)
        return Arrived(tensor, time.perf_counter() - started)

    def close(self) -> None:
        self._memory.close()
