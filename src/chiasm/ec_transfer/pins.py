"""Pins: where the workers of an instance, in other processes of the same host, load what its scheduler role has brought in.

The scheduler role keeps each entry in memory that others can open, behind its header, and the metadata of a step has a pin for
each. Whoever loads one looks for the header first, so a pin that has outlived its entry is a loss and never another embedding:
a file of one entry is never used for another, and in an arena the header is cleared before the range is used again, and no
range that is locked is.
"""

from __future__ import annotations

import errno
import logging
import os
from dataclasses import dataclass, field, fields
from fcntl import F_RDLCK
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from chiasm.ec_transfer.base import ECConnectorMetadata
from chiasm.ec_transfer.device import take_over, to_device
from chiasm.ec_transfer.entry_file import HEADER_BYTES, EntryHeader, OpenFile, map_file, read_range, tensor_of
from chiasm.transfer.memory_file import set_lock

_logger = logging.getLogger(__name__)
_HeldT = TypeVar("_HeldT")


class Pin(NamedTuple):
    """An entry in a file that a process of this host has open. Plain data, which may be sent to another process."""

    process: int
    descriptor: int
    header: EntryHeader
    offset: int = 0
    """Where the header begins in the file."""
    is_in_arena: bool = False
    """Whether the file has other entries as well, and will have others here."""

    @classmethod
    def here(cls, descriptor: int, header: EntryHeader, offset: int = 0, *, is_in_arena: bool = False) -> Pin:
        """Return the pin of an entry in a file of this process."""
        return cls(os.getpid(), descriptor, header, offset, is_in_arena)

    def load(self, device: str) -> torch.Tensor:
        """Return the embedding on ``device``, for use by this thread; on a CPU it is mapped where it is, unless in an arena.

        Raises OSError if the entry is not there any more, or if the process runs on another host.
        """
        path = f"/proc/{self.process}/fd/{self.descriptor}"
        file = OpenFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
        size = HEADER_BYTES + self.header.data_bytes
        if self.is_in_arena:  # the lock ends with the file
            set_lock(file.descriptor, F_RDLCK, self.offset, size)
        if os.pread(file.descriptor, HEADER_BYTES, self.offset) != self.header.to_bytes():
            raise OSError(errno.ESTALE, "The entry is not there any more")
        if self.is_in_arena:
            data = read_range(file.descriptor, self.offset + HEADER_BYTES, self.header.data_bytes)
        else:
            data = map_file(file.descriptor, size)[HEADER_BYTES:]
        return take_over(to_device(tensor_of(self.header, data), device))


class EntryMemory:
    """Memory of one entry: this process's own or, if ``is_shared``, a file without a name that others find by a pin."""

    def __init__(self, header: EntryHeader, device: str = "cpu", *, is_shared: bool) -> None:
        """``device`` is where the entry goes when it is complete, unless it is shared."""
        self._header = header
        self._device = device
        self._file = OpenFile(os.memfd_create("chiasm-entry", os.MFD_CLOEXEC)) if is_shared else None
        if self._file is None:
            self._data = torch.empty(header.data_bytes, dtype=torch.uint8)
        else:
            size = HEADER_BYTES + header.data_bytes
            os.ftruncate(self._file.descriptor, size)
            path = f"/dev/fd/{self._file.descriptor}"
            self._data = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)[HEADER_BYTES:]
        self.tensor = tensor_of(header, self._data)

    @property
    def buffer(self) -> memoryview:
        """The bytes of the embedding, to be written before ``finish``."""
        return self._data.numpy().data

    def finish(self) -> None:
        """The embedding is complete."""
        if self._file is None:
            self.tensor = to_device(self.tensor, self._device)
        else:
            os.pwrite(self._file.descriptor, self._header.to_bytes(), 0)

    def pin(self) -> Pin | None:
        """Return where others find it, as long as this object lives; None if they can't."""
        return None if self._file is None else Pin.here(self._file.descriptor, self._header)


@dataclass(frozen=True)
class PinnedMetadata(ECConnectorMetadata, Generic[_HeldT]):
    """What one step loads, with what the scheduler role holds of it.

    What is held is not pickled. A worker in another process finds it by its pin, as long as the original metadata exists.
    """

    held: dict[str, _HeldT] = field(default_factory=dict, repr=False, compare=False)
    pins: dict[str, Pin] = field(default_factory=dict, repr=False, compare=False)

    def load_pinned(self, identifier: str, device: str) -> torch.Tensor | None:
        """Return an embedding on ``device``, for use by this thread; None if it has no pin, or is gone, which is logged."""
        pin = self.pins.get(identifier)
        if pin is None:
            return None
        try:
            return pin.load(device)
        except OSError as error:
            _logger.warning(
                "The embedding of item %s can't be loaded from the scheduler's process: %s", identifier, error
            )
            return None

    def __reduce__(self) -> tuple[type[Any], tuple[Any, ...]]:
        return type(self), tuple({} if each.name == "held" else getattr(self, each.name) for each in fields(self))
