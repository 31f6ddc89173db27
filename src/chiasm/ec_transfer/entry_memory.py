"""One entry in memory that processes share: the same bytes as in an entry's file, header first.

The header is written last and cleared first, so memory that has it also has the embedding: who finds the header that was
announced, and keeps the memory from being reused, has the right bytes.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from chiasm.ec_transfer.entry_file import HEADER_BYTES, EntryHeader, tensor_of

if TYPE_CHECKING:
    import xxhash

_LARGE_BYTES = 8 << 20
"""From this size on, an embedding is copied and hashed at the same time. A thread costs a smaller one more than it saves."""
_CLEARED = bytes(HEADER_BYTES)


def write_entry(address: int, header: EntryHeader, tensor: torch.Tensor, *, with_checksum: bool) -> EntryHeader:
    """Write an entry to ``address``, where there is room for it, and return its header, with the checksum if wanted."""
    target, size = address + HEADER_BYTES, header.data_bytes
    hasher = header.hasher() if with_checksum else None
    if not (tensor.is_cpu and tensor.is_contiguous()):
        tensor_of(header, torch.from_numpy(_bytes_at(target, size))).copy_(tensor)
        if hasher is not None:
            hasher.update(_bytes_at(target, size).data)
    elif hasher is None:
        ctypes.memmove(target, tensor.data_ptr(), size)
    else:
        _copy_and_hash(target, tensor.data_ptr(), size, hasher)
    if hasher is not None:
        header = header._replace(checksum=hasher.hexdigest())
    ctypes.memmove(address, header.to_bytes(), HEADER_BYTES)
    return header


def _copy_and_hash(target: int, source: int, size: int, hasher: xxhash.xxh3_128) -> None:
    """Both release the interpreter's lock."""
    data = _bytes_at(source, size).data
    if size < _LARGE_BYTES:
        hasher.update(data)
        ctypes.memmove(target, source, size)
        return
    hashing = threading.Thread(target=hasher.update, args=(data,))
    hashing.start()
    try:
        ctypes.memmove(target, source, size)
    finally:
        hashing.join()


def clear_entry(address: int) -> None:
    """Let nobody find an entry at ``address`` any more."""
    ctypes.memmove(address, _CLEARED, HEADER_BYTES)


def has_header(address: int, header: EntryHeader) -> bool:
    """Return whether the entry at ``address`` is the one with this header, and complete."""
    return ctypes.string_at(address, HEADER_BYTES) == header.to_bytes()


class Checksum:
    """Compares an embedding with its checksum while it comes to ``address``, header first."""

    def __init__(self, address: int, header: EntryHeader) -> None:
        self._header = header
        self._hasher = header.hasher()
        self._begin = address + HEADER_BYTES
        self._end = address

    def add(self, num_bytes: int) -> None:
        """So many more bytes are here."""
        begin = max(self._begin, self._end)
        self._end += num_bytes
        if begin < self._end:
            self._hasher.update(_bytes_at(begin, self._end - begin).data)

    def is_right(self) -> bool:
        """Return whether what came is what was published."""
        return self._hasher.hexdigest() == self._header.checksum


def tensor_at(address: int, header: EntryHeader, owner: object, release: Callable[[], None]) -> torch.Tensor:
    """Return the embedding of the entry at ``address``, without a copy. It must not be written to.

    ``owner`` keeps the memory where it is. ``release`` is called, from any thread, when nothing uses the tensor any more.
    """
    lent = _Lent(address + HEADER_BYTES, header.data_bytes, owner)
    weakref.finalize(lent, release).atexit = False
    return tensor_of(header, torch.from_numpy(np.asarray(lent)))


class _Lent:
    """Memory as numpy takes it: an array keeps this object, and a tensor keeps its array."""

    def __init__(self, address: int, num_bytes: int, owner: object = None) -> None:
        self.__array_interface__ = {"data": (address, False), "shape": (num_bytes,), "typestr": "|u1", "version": 3}
        self._owner = owner


def _bytes_at(address: int, num_bytes: int) -> npt.NDArray[np.uint8]:
    return np.asarray(_Lent(address, num_bytes))
