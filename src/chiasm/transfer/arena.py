"""Bounded memory, in one memory file, of which contiguous pieces are allocated and freed.

A piece begins on a page of its own. The first free place that is large enough is taken, so memory that was used before is used
again, and pages that nobody ever needed cost nothing. Not for several threads at once.
"""

from __future__ import annotations

import bisect
import mmap

from chiasm.transfer.memory import Memory, Range
from chiasm.transfer.memory_file import MemoryFile


class Arena:
    """Raises ConfigurationError if the memory can't be had."""

    def __init__(self, num_bytes: int, name: str) -> None:
        """``num_bytes`` is rounded up to pages. ``name`` is what tools such as ``pmap`` show."""
        self.num_bytes = max(1, _pages(num_bytes))
        self.file = MemoryFile(self.num_bytes, name)
        self.free_bytes = self.num_bytes
        self._free: list[Range] = [Range(0, self.num_bytes)]
        """In order, and never two that touch."""

    @property
    def memory(self) -> Memory:
        """All of it, for data planes."""
        return self.file.memory()

    def allocate(self, num_bytes: int) -> Range | None:
        """Return a piece of at least so many bytes (1 or more); None if there is none."""
        size = _pages(num_bytes)
        for index, (offset, free) in enumerate(self._free):
            if free >= size:
                self._free[index : index + 1] = [Range(offset + size, free - size)] if free > size else []
                self.free_bytes -= size
                return Range(offset, size)
        return None

    def free(self, piece: Range) -> None:
        """Take back a piece that was allocated."""
        index = bisect.bisect(self._free, piece)
        begin, end = piece.offset, piece.offset + piece.num_bytes
        first, last = index, index
        if index and sum(self._free[index - 1]) == begin:
            first, begin = index - 1, self._free[index - 1].offset
        if index < len(self._free) and self._free[index].offset == end:
            last, end = index + 1, sum(self._free[index])
        self._free[first:last] = [Range(begin, end - begin)]
        self.free_bytes += piece.num_bytes

    def close(self) -> None:
        """Let nobody map the memory from now on. It stays while something refers to it."""
        self.file.close()


def _pages(num_bytes: int) -> int:
    return -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
