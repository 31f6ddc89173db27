"""An arena: bounded memory in one memory file, allocated in pieces.

A piece is whole pages, contiguous, and at the lowest address where it fits (*first fit*), and free neighbours are joined. That
keeps what is used at the low end of the file, so pages that were touched are used again before new ones: the first touch of a
page takes about ten times as long as a copy into it. Nothing is ever moved, so room can be there in parts that are too small
(Robson, 1977: in the worst case, pieces of at most n pages need log2(n) times as much memory as they have bytes). Measured in
4 GiB: of five sizes from 0.5 to 67 MB, the oldest freed first, no room was found only when 98 % or more were needed; of random
sizes from 0.25 to 95 MB, of which any of the oldest quarter went, when 91 % were (median; 71 % in the worst of thousands).

Readers in other processes may use the bytes of a piece in place, and must be safe from an owner that believes them gone. So a
range is locked (open file description locks, fcntl(2)): by the arena for writing, from ``allocate`` to ``publish``, and by a
reader for reading, as long as it uses the bytes (``shared_memory.py``). A reader that gets its lock sees bytes that don't
change. The arena passes over ranges that somebody has locked. The kernel ends the locks of a process that dies.
"""

from __future__ import annotations

import bisect
import ctypes
import fcntl
import logging
import mmap
import threading
from collections import deque
from collections.abc import Callable, Sequence

from chiasm.transfer.memory_file import MemoryFile, find_lock, set_lock

_logger = logging.getLogger(__name__)

ALIGNMENT = mmap.PAGESIZE
"""Pieces begin at a multiple of it, so that a process may map one alone."""
_MADV_POPULATE_WRITE = 23
_WARM_STEP_BYTES = 16 << 20


class Piece:
    """A part of an arena, which belongs to whoever allocated it until the last of its holders has released it."""

    __slots__ = ("_arena", "holders", "is_published", "num_bytes", "offset", "size_bytes")

    def __init__(self, arena: Arena, offset: int, num_bytes: int, size_bytes: int) -> None:
        self._arena = arena
        self.offset = offset
        """In the arena's file."""
        self.num_bytes = num_bytes
        self.size_bytes = size_bytes
        """With what rounding to pages adds."""
        self.holders = 1
        self.is_published = False

    @property
    def buffer(self) -> memoryview:
        """The bytes, writable. To be written only before ``publish``."""
        return self._arena.file.buffer[self.offset : self.offset + self.num_bytes]

    def publish(self) -> None:
        """The bytes are complete, and readers may lock them from now on. Pieces that no reader gets needn't be published."""
        self._arena._publish(self)

    def hold(self) -> None:
        """Count one more holder. Only while there is one."""
        self._arena._hold(self)

    def release(self) -> None:
        """Count one holder less; without any, the bytes are free. Any thread, and also from finalizers: it takes no lock."""
        self._arena._release(self)


class Arena:
    """Bounded memory in a file, for pieces of any size. All calls may come from any thread.

    Raises ConfigurationError if the memory can't be had. ``warm_bytes`` beyond the highest piece so far are touched ahead of
    their use, on a thread of their own, so that the first use of memory is as fast as later ones. ``released`` is called after
    each release of a piece, perhaps from a finalizer, so it must only wake somebody.
    """

    def __init__(
        self, num_bytes: int, name: str, *, warm_bytes: int = 0, released: Callable[[], None] = lambda: None
    ) -> None:
        self.num_bytes = _rounded(num_bytes)
        self.file = MemoryFile(self.num_bytes, name)
        self._released = released
        self._lock = threading.Lock()
        self._free: list[tuple[int, int]] = [(0, self.num_bytes)]
        """Begin and end of each free range, in order; no two touch."""
        self._locked: list[tuple[int, int]] = []
        """Ranges that are free, except that a reader had them locked."""
        self._returned: deque[Piece] = deque()
        """Pieces that were released by a holder, not counted yet."""
        self._used_bytes = 0
        self._is_closed = False
        self._warm_bytes = warm_bytes
        self._touched_end = 0
        """Up to here pages are touched."""
        self._highest_end = 0
        """Where the highest piece so far ends."""
        self._is_warming = False
        with self._lock:
            self._warm_ahead()

    @property
    def used_bytes(self) -> int:
        """What pieces take, with their rounding to pages."""
        with self._lock:
            self._take_back()
            return self._used_bytes

    def allocate(self, num_bytes: int) -> Piece | None:
        """Return a piece with one holder, whose bytes are whatever was there; None if there is no room for it now."""
        pieces = self.allocate_all([num_bytes])
        return None if pieces is None else pieces[0]

    def allocate_all(self, sizes: Sequence[int]) -> list[Piece] | None:
        """Return a piece of each size (at least 1 byte), in order, or None if there is no room for all of them now."""
        with self._lock:
            self._take_back()
            self._look_at_locked()
            pieces: list[Piece] = []
            for num_bytes in sizes:
                assert num_bytes > 0
                size = _rounded(num_bytes)
                offset = self._find(size)
                if offset is None:
                    for piece in pieces:
                        self._free_piece(piece)
                    return None
                self._used_bytes += size
                self._highest_end = max(self._highest_end, offset + size)
                pieces.append(Piece(self, offset, num_bytes, size))
            self._warm_ahead()
            return pieces

    def close(self) -> None:
        """Let nobody map the memory from now on. Pieces stay usable in this process. Idempotent."""
        with self._lock:
            self._is_closed = True
            self.file.close()

    # ---- pieces -----------------------------------------------------------------------------------------------------

    def _publish(self, piece: Piece) -> None:
        with self._lock:
            assert not piece.is_published
            piece.is_published = True
            self._unlock(piece.offset, piece.size_bytes)

    def _hold(self, piece: Piece) -> None:
        with self._lock:
            self._take_back()
            assert piece.holders > 0
            piece.holders += 1

    def _release(self, piece: Piece) -> None:
        self._returned.append(piece)
        self._released()

    def _take_back(self) -> None:
        while self._returned:
            piece = self._returned.popleft()
            assert piece.holders > 0
            piece.holders -= 1
            if not piece.holders:
                self._free_piece(piece)

    def _free_piece(self, piece: Piece) -> None:
        if not piece.is_published:
            self._unlock(piece.offset, piece.size_bytes)
        self._used_bytes -= piece.size_bytes
        self._insert(piece.offset, piece.offset + piece.size_bytes)

    # ---- free ranges ------------------------------------------------------------------------------------------------

    def _find(self, size: int) -> int | None:
        """Take the first range of this size that nobody has locked, lock it for writing, and return where it begins."""
        index = 0
        while index < len(self._free):
            begin, end = self._free[index]
            if end - begin < size:
                index += 1
                continue
            locked = self._lock_for_writing(begin, size)
            if locked is None:
                self._free[index : index + 1] = [(begin + size, end)] if begin + size < end else []
                return begin
            self._locked.append(locked)
            self._free[index : index + 1] = [
                part for part in ((begin, locked[0]), (locked[1], end)) if part[0] < part[1]
            ]
        return None

    def _insert(self, begin: int, end: int) -> None:
        """Make a range free, joined with its neighbours."""
        index = bisect.bisect(self._free, (begin, end))
        if index < len(self._free) and self._free[index][0] == end:
            end = self._free.pop(index)[1]
        if index and self._free[index - 1][1] == begin:
            index -= 1
            begin = self._free.pop(index)[0]
        self._free.insert(index, (begin, end))

    def _look_at_locked(self) -> None:
        """Make those ranges free again that readers have let go."""
        waiting, self._locked = self._locked, []
        for begin, end in waiting:
            if self._locked_by_others(begin, end - begin) is None:
                self._insert(begin, end)
            else:
                self._locked.append((begin, end))

    # ---- locks ------------------------------------------------------------------------------------------------------

    def _lock_for_writing(self, begin: int, size: int) -> tuple[int, int] | None:
        """Return None if the range is locked now; otherwise the part of it that somebody else has locked, in whole pages."""
        while not self._is_closed:
            try:
                set_lock(self.file.descriptor, fcntl.F_WRLCK, begin, size)
            except BlockingIOError:
                conflict = self._locked_by_others(begin, size)
                if conflict is not None:
                    return conflict
            else:
                return None
        return None

    def _locked_by_others(self, begin: int, size: int) -> tuple[int, int] | None:
        if self._is_closed:
            return None
        found = find_lock(self.file.descriptor, begin, size)
        if found is None:
            return None
        start, length = found
        first = max(begin, start // ALIGNMENT * ALIGNMENT)
        last = begin + size if length == 0 else min(begin + size, _rounded(start + length))
        return first, last

    def _unlock(self, begin: int, size: int) -> None:
        if not self._is_closed:
            set_lock(self.file.descriptor, fcntl.F_UNLCK, begin, size)

    # ---- touching pages ahead of their use --------------------------------------------------------------------------

    def _warm_ahead(self) -> None:
        """Have a thread touch pages, if less than half of ``warm_bytes`` are left that are touched and were never used."""
        left = self._touched_end - self._highest_end
        if (
            self._warm_bytes
            and left <= self._warm_bytes // 2
            and self._touched_end < self.num_bytes
            and not self._is_warming
        ):
            self._is_warming = True
            threading.Thread(target=self._warm, name="chiasm-warm", daemon=True).start()

    def _warm(self) -> None:
        """Touch pages without changing them. On a kernel before 5.14 the first pieces do it instead."""
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        buffer = self.file.buffer  # keeps the memory
        while True:
            with self._lock:
                begin = self._touched_end
                end = min(self._highest_end + self._warm_bytes, self.num_bytes)
                if self._is_closed or begin >= end:
                    self._is_warming = False
                    break
            size = min(_WARM_STEP_BYTES, end - begin)
            if libc.madvise(self.file.address + begin, size, _MADV_POPULATE_WRITE) != 0:
                _logger.debug("The pages of an arena can't be touched ahead of their use here.")
                break  # and isn't tried again
            self._touched_end = begin + size
        del buffer


def _rounded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
