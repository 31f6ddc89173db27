"""How a reader brings in the embeddings of one holder: they land in an arena of its own, or stay where they are.

Those that stay are used in the holder's memory. The reader locks the range of the holder's file before it looks for the entry
there. If it then finds the entry's header, the entry is whole and stays, because the holder clears the header before it gives
the range back, and uses no range that is locked. That holds whatever happens to the connection or to either process. If an
engine's workers are other processes (``is_shared``), they find an embedding in either place in the same way, by its pin.
"""

from __future__ import annotations

import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch

from chiasm.ec_transfer.device import to_device
from chiasm.ec_transfer.entry_file import HEADER_BYTES, EntryHeader
from chiasm.ec_transfer.entry_memory import Checksum, clear_entry, has_header, tensor_at
from chiasm.ec_transfer.pins import EntryMemory, Pin
from chiasm.ec_transfer.wants import Read
from chiasm.transfer.arena import Arena, Piece
from chiasm.transfer.memory import ReachedMemory, Run
from chiasm.transfer.shared_memory import SharedMemory

MAX_LENT_SHARE = 4
"""A reader keeps at most one part in so many of a holder's memory from being reused; what is more, it copies."""
NEVER_LENT_SHARE = 8
"""It also copies what lies in the last one of so many parts, so a holder can always use that again, however many readers read.
That concerns as many of the embeddings once the memory is full. Before, nothing lies there, since what is low is used first."""
MAX_LENT_ENTRIES = 512
"""A reader uses so many entries of one holder in place, since each takes a descriptor; what is more, it copies."""
_FREE_AFTER_SECONDS = (0.0, 0.1, 0.4, 1.6, 6.4)
"""When it is seen, one after the other, whether a holder has ended. One that was killed closes its connections first."""


class Arrived(NamedTuple):
    """An embedding in this process, verified, on the device. The thread that uses it calls ``take_over``."""

    tensor: torch.Tensor
    seconds: float
    """How long bringing it in took."""
    pin: Pin | None = None
    """Where workers in other processes load it, as long as this object exists; None if there are none."""
    memory: EntryMemory | None = None
    """What keeps it there, if the tensor doesn't."""


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
    """Lends the first ``end`` bytes of a memory to an engine, at most ``max_entries`` of together ``max_bytes``.

    What is more, or lies behind them, is copied. So an engine, which may keep what it has for long, doesn't take all of the
    memory, nor leaves of it only parts that are too small.
    """

    def __init__(
        self, end: int, max_bytes: int, device: str, *, is_shared: bool, max_entries: int = sys.maxsize
    ) -> None:
        self._end = end
        self._max_bytes = max_bytes
        self._max_entries = max_entries
        self._device = "cpu" if is_shared else device
        self._is_cpu = torch.device(self._device).type == "cpu"
        self._is_shared = is_shared
        self._lock = threading.Lock()
        self._entries = 0
        self._bytes = 0
        self._returned: deque[int] = deque()
        """Sizes of tensors that are gone. The collector of garbage may run anywhere, so it takes no lock."""

    @property
    def is_used(self) -> bool:
        """Whether anything is lent."""
        with self._lock:
            self._take_back()
            return self._entries > 0

    def stays(self, offset: int, header: EntryHeader) -> bool:
        """Return whether the embedding of the entry at ``offset`` needn't be copied now."""
        with self._lock:
            return self._is_lent(offset, header.data_bytes)

    def _take_back(self) -> None:
        while self._returned:
            self._bytes -= self._returned.popleft()
            self._entries -= 1

    def _is_lent(self, offset: int, size: int) -> bool:
        self._take_back()
        return (
            self._is_cpu
            and offset + HEADER_BYTES + size <= self._end
            and self._bytes + size <= self._max_bytes
            and self._entries < self._max_entries
        )

    def lend(
        self, offset: int, address: int, pin: Pin, owner: object, release: Callable[[], None], started: float
    ) -> Arrived:
        """Return the embedding of the entry at ``offset``, which was begun at that time (``perf_counter``).

        It is at ``address`` here, and others find it by ``pin``. ``release`` is called when its memory isn't needed any more.
        """
        size = pin.header.data_bytes
        with self._lock:
            stays = self._is_lent(offset, size)
            if stays:
                self._bytes += size
                self._entries += 1

        def give_back() -> None:
            release()
            if stays:
                self._returned.append(size)

        tensor = tensor_at(address, pin.header, owner, give_back)
        if not self._is_shared:
            if not stays:
                tensor = tensor.clone() if self._is_cpu else to_device(tensor, self._device)
            return Arrived(tensor, time.perf_counter() - started)
        if stays:
            return Arrived(tensor, time.perf_counter() - started, pin)
        memory = EntryMemory(pin.header, is_shared=True)
        memory.tensor.copy_(tensor)
        memory.finish()
        return Arrived(memory.tensor, time.perf_counter() - started, memory.pin(), memory)


class Landing:
    """An arena into which embeddings come, over any number of sources.

    Up to ``num_bytes`` may arrive at the same time, and as much may be lent: only in the first half, so that one of that size
    always finds room in the other. ``freed`` is called, from any thread, when there may be room again; it must only wake
    somebody. ``is_shared``: whether other processes find what has landed, by its pin.
    """

    def __init__(self, num_bytes: int, device: str, freed: Callable[[], None], *, is_shared: bool) -> None:
        self.arena = Arena(2 * (HEADER_BYTES + num_bytes), "chiasm-ec-in", released=freed)
        self._is_shared = is_shared
        self._lent = _Lent(self.arena.num_bytes // 2, num_bytes, device, is_shared=is_shared)

    def hand_over(self, piece: Piece, header: EntryHeader, started: float) -> Arrived:
        """Return the embedding that has landed, on the device. The piece is released when it isn't needed any more."""
        file = self.arena.file
        pin = Pin.here(file.descriptor, header, piece.offset, is_in_arena=True)
        if self._is_shared:
            piece.publish()
        address = file.address + piece.offset
        return self._lent.lend(piece.offset, address, pin, file.buffer, self.releaser(piece), started)

    def releaser(self, piece: Piece) -> Callable[[], None]:
        """Return what gives a piece back, also from a finalizer."""
        file, is_shared = self.arena.file, self._is_shared
        address, buffer = file.address + piece.offset, file.buffer

        def release() -> None:
            if is_shared and buffer:  # which keeps the memory
                clear_entry(address)  # before anybody may use it again
            piece.release()

        return release


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
        release = self._landing.releaser(piece)
        address = self._landing.arena.file.address + piece.offset
        checksum = Checksum(address, read.header)
        try:
            if not self._reached.read([Run(piece.offset, read.here.offset, read.num_bytes)], stop, checksum.add):
                if stop():
                    release()
                    return None
                raise EntryUnusable("it is not granted any more", bad=False)
            if not has_header(address, read.header):
                raise EntryUnusable("it is another one, or torn", bad=True)
            if not checksum.is_right():
                raise EntryUnusable("its checksum is wrong", bad=True)
        except BaseException:
            release()
            raise
        return self._landing.hand_over(piece, read.header, started)

    def close(self) -> None:
        self._reached.close()


class MappedSource(Source):
    """A holder of this host, whose embeddings are used where they are."""

    def __init__(self, memory: SharedMemory, num_bytes: int, device: str, *, is_shared: bool) -> None:
        """``num_bytes`` is the size of the holder's memory."""
        self._memory = memory
        end, share = num_bytes - num_bytes // NEVER_LENT_SHARE, num_bytes // MAX_LENT_SHARE
        self._lent = _Lent(end, share, device, is_shared=is_shared, max_entries=MAX_LENT_ENTRIES)

    def is_quick(self, read: Read) -> bool:
        return self._lent.stays(read.here.offset, read.header)

    def bring(self, read: Read, stop: Callable[[], bool]) -> Arrived | None:
        started = time.perf_counter()
        held = self._memory.hold(read.here.offset, read.num_bytes)
        if held is None:
            raise EntryUnusable("it was evicted", bad=False)
        offset = self._memory.file_offset + read.here.offset
        address = self._memory.file.address + offset
        if not has_header(address, read.header):
            held.release()
            raise EntryUnusable("it was evicted", bad=False)
        pin = Pin.here(held.descriptor, read.header, offset, is_in_arena=True)
        return self._lent.lend(read.here.offset, address, pin, held.buffer, held.release, started)

    def close(self) -> None:
        if self._lent.is_used:
            threading.Thread(target=self._free_the_rest, name="chiasm-free", daemon=True).start()
        else:
            self._memory.close()

    def _free_the_rest(self) -> None:
        """Of the memory of a holder that has ended, keep only what is lent."""
        for seconds in _FREE_AFTER_SECONDS:
            time.sleep(seconds)
            if self._memory.file.free_the_rest():
                break
        self._memory.close()
