"""One entry in memory that processes share: the same bytes as in an entry's file, header first.

The header is written last and cleared first, so memory that has it also has the embedding: who finds the header that was
announced, and keeps the memory from being reused, has the right bytes.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from chiasm.ec_transfer.entry_file import HEADER_BYTES, EntryHeader, bytes_of, dtype_of

if TYPE_CHECKING:
    import xxhash

_PIECE_BYTES = 256 << 10
"""What is copied and hashed at a time, while it is in the cache of a core."""
_CLEARED = bytes(HEADER_BYTES)


def write_entry(address: int, header: EntryHeader, tensor: torch.Tensor, *, with_checksum: bool) -> EntryHeader:
    """Write an entry to ``address``, where there is room for it, and return its header, with the checksum if wanted."""
    target = address + HEADER_BYTES
    hasher = header.hasher() if with_checksum else None
    if tensor.is_cuda:
        _tensor(_bytes_at(target, header.data_bytes), header).copy_(tensor)
        if hasher is not None:
            hasher.update(_bytes_at(target, header.data_bytes).data)
    else:
        data = bytes_of(tensor)
        _copy(target, np.frombuffer(data, np.uint8).ctypes.data, len(data), hasher)
    if hasher is not None:
        header = header._replace(checksum=hasher.hexdigest())
    ctypes.memmove(address, header.to_bytes(), HEADER_BYTES)
    return header


def clear_entry(address: int) -> None:
    """Let nobody find an entry at ``address`` any more."""
    ctypes.memmove(address, _CLEARED, HEADER_BYTES)


def has_header(address: int, header: EntryHeader) -> bool:
    """Return whether the entry at ``address`` is the one with this header, and complete."""
    return ctypes.string_at(address, HEADER_BYTES) == header.to_bytes()


def has_checksum(address: int, header: EntryHeader) -> bool:
    """Return whether the embedding at ``address`` has the checksum of its header. Reads all of it."""
    hasher = header.hasher()
    hasher.update(_bytes_at(address + HEADER_BYTES, header.data_bytes).data)
    return hasher.hexdigest() == header.checksum


def tensor_at(address: int, header: EntryHeader, owner: object, release: Callable[[], None]) -> torch.Tensor:
    """Return the embedding of the entry at ``address``, without a copy. It must not be written to.

    ``owner`` keeps the memory where it is. ``release`` is called, from any thread, when nothing uses the tensor any more.
    """
    lent = _Lent(address + HEADER_BYTES, header.data_bytes, owner)
    weakref.finalize(lent, release).atexit = False
    return _tensor(np.asarray(lent), header)


class _Lent:
    """Memory as numpy takes it: an array keeps this object, and a tensor keeps its array."""

    def __init__(self, address: int, num_bytes: int, owner: object = None) -> None:
        self.__array_interface__ = {"data": (address, False), "shape": (num_bytes,), "typestr": "|u1", "version": 3}
        self._owner = owner


def _bytes_at(address: int, num_bytes: int) -> npt.NDArray[np.uint8]:
    return np.asarray(_Lent(address, num_bytes))


def _tensor(data: npt.NDArray[np.uint8], header: EntryHeader) -> torch.Tensor:
    return torch.from_numpy(data).view(dtype_of(header)).view(header.shape)


def _copy(target: int, source: int, num_bytes: int, hasher: xxhash.xxh3_128 | None) -> None:
    """Copy bytes. Both memmove and the hash release the interpreter's lock."""
    if hasher is None:
        ctypes.memmove(target, source, num_bytes)
        return
    for done in range(0, num_bytes, _PIECE_BYTES):
        size = min(_PIECE_BYTES, num_bytes - done)
        hasher.update(_bytes_at(source + done, size).data)
        ctypes.memmove(target + done, source + done, size)
