"""The interface of data planes: memory that a holder offers, and how a reader reaches it.

A data plane moves ranges of bytes from the memory of one process, the *holder*, to that of another, the *reader*. It decides
nothing: that a range may be read, and until when, the two agree upon over a channel (``channel.py``). What happens, in order::

    holder                                             reader
    -------------------------------------------------  -----------------------------------------------
    plane.offer(memory)                        (once)  plane.prepare(memory)                    (once)
    offered.describe(reader)        (a reader is met)  -> plane.reach(peer, description, memory)
    offered.grant(reader, claim, ranges)               -> reached.read(runs, stop)
    offered.withdraw(reader, claim)   (it gave back)
    offered.dismiss(reader)            (it went away)  reached.close()
    offered.close()                       (at the end)

All offsets are in bytes from the beginning of the memory that was given to ``offer`` and ``reach``.
"""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import msgspec

from chiasm.errors import ConfigurationError
from chiasm.transfer.errors import TransferError
from chiasm.transfer.memory_file import MemoryFile
from chiasm.wire import UNREADABLE

_DescriptionT = TypeVar("_DescriptionT", bound=msgspec.Struct)


class Range(NamedTuple):
    """Bytes of a holder's memory."""

    offset: int
    num_bytes: int


class Run(NamedTuple):
    """Bytes to be copied from ``remote`` in the holder's memory to ``local`` in the reader's; ``num_bytes`` is at least 1."""

    local: int
    remote: int
    num_bytes: int


class Peer(NamedTuple):
    """Where the control channel of a holder is."""

    host: str
    port: int


@dataclass(frozen=True)
class Memory:
    """Bytes of this process, at a fixed place while anything refers to this object.

    ``device`` is torch's name (``"cpu"``, ``"cuda:0"``). Planes whose holders need a file (:attr:`DataPlane.needs_file`) get
    memory that is ``file``, from ``file_offset`` on.
    """

    address: int
    num_bytes: int
    device: str = "cpu"
    owner: object = field(default=None, repr=False)
    """What keeps the bytes where they are."""
    file: MemoryFile | None = None
    file_offset: int = 0

    @classmethod
    def of_file(cls, file: MemoryFile, offset: int = 0, num_bytes: int | None = None) -> Memory:
        """Return a part of a memory file, by default all that follows ``offset``."""
        size = file.num_bytes - offset if num_bytes is None else num_bytes
        assert 0 <= offset <= offset + size <= file.num_bytes
        return cls(file.address + offset, size, owner=file.buffer, file=file, file_offset=offset)


class OfferedMemory(ABC):
    """A holder's memory, as it is offered to all readers. All calls come from the control thread, except for ``close``."""

    progress_seconds: float | None = None
    """How often the transport needs :meth:`progress` while something may be read; None if never."""

    @abstractmethod
    def describe(self, reader: int) -> bytes:
        """Return what a reader needs in order to reach the memory. ``reader`` is a number that is used for one connection."""

    def grant(self, reader: int, claim: int, ranges: Iterable[Range]) -> None:
        """From now on the reader may read these ranges. ``claim`` is a number that names them until they are withdrawn.

        Planes that can't enforce it do nothing.
        """
        return None

    def withdraw(self, reader: int, claim: int) -> None:
        """The reader may no longer read what was granted as ``claim``. A claim that isn't known is ignored."""
        return None

    def dismiss(self, reader: int) -> None:
        """The reader has gone: withdraw everything that it was granted, and forget it."""
        return None

    def attach(self, reader: int, nonce: bytes, proof: bytes, connection: socket.socket) -> bool:
        """A connection came that wants to carry data for ``reader``; ``nonce`` is what it was challenged with.

        Return whether the proof is right; the socket is then the plane's. Planes without connections of their own take none.
        """
        return False

    def progress(self) -> None:
        """Do the holder's part of reads that readers have begun."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Stop offering the memory. Called once, when nobody has a grant any more."""


class ReachedMemory(ABC):
    """The memory of one holder, as this reader reads it."""

    @abstractmethod
    def read(
        self, runs: Sequence[Run], stop: Callable[[], bool], received: Callable[[int], None] = lambda num_bytes: None
    ) -> bool:
        """Copy the runs (at least one), and return when nothing is written any more.

        Called on several threads at once, and only with runs that lie within the reader's own memory. Calls ``stop`` every few
        megabytes. Calls ``received`` with how many more bytes of the runs are here, in their order, before others are. Returns
        whether all bytes are here: some may be missing if ``stop`` returned True, or if the holder has withdrawn the grant.
        Raises TransferError if nothing of this holder can be read any more.
        """

    @abstractmethod
    def close(self) -> None:
        """Release the holder's memory. Called once, when nobody reads it."""


class DataPlane(ABC):
    """One way to move bytes. Its ``__init__`` raises ConfigurationError if it can't work here."""

    needs_file: bool = False
    """Whether a holder's memory must lie in a memory file."""

    @abstractmethod
    def offer(self, memory: Memory) -> OfferedMemory:
        """Holder: let readers read the memory. Raises ConfigurationError if it can't be offered."""

    def prepare(self, memory: Memory) -> None:
        """Reader: check that bytes can be written to this memory. Raises ConfigurationError if they can't."""
        return None

    @abstractmethod
    def reach(self, peer: Peer, description: bytes, memory: Memory) -> ReachedMemory:
        """Reader: make a holder's memory readable into this memory, given what ``describe`` returned there.

        The description is untrusted. Called on any thread; may take a while. Raises TransferError if the memory can't be
        reached.
        """


def read_description(description: bytes, kind: type[_DescriptionT]) -> _DescriptionT:
    """Decode what a holder's ``describe`` returned with msgpack. Raises TransferError if it is something else."""
    try:
        return msgspec.msgpack.decode(description, type=kind)
    except UNREADABLE as error:
        raise TransferError(f"the description of its memory is not understood: {error}") from error


def check_remote(run: Run, num_bytes: int) -> None:
    """Raise TransferError unless the run lies in a holder's memory of this size."""
    if not 0 <= run.remote <= run.remote + run.num_bytes <= num_bytes:
        raise TransferError("it granted bytes that it does not have")


def batches_of(runs: Sequence[Run], *, max_bytes: int, max_runs: int) -> Iterator[list[Run]]:
    """Group runs, in order, into batches of at most so many bytes and runs, which may cut runs."""
    batch: list[Run] = []
    room = max_bytes
    for run in runs:
        done = 0
        while done < run.num_bytes:
            size = min(run.num_bytes - done, room)
            batch.append(Run(run.local + done, run.remote + done, size))
            done += size
            room -= size
            if not room or len(batch) == max_runs:
                yield batch
                batch, room = [], max_bytes
    if batch:
        yield batch


def check_host_memory(device: str, way: str) -> None:
    """Raise ConfigurationError for the memory of a GPU. ``way`` is what can't reach it."""
    if device.partition(":")[0] != "cpu":
        raise ConfigurationError(f"Bytes on {device} can't be moved over {way}; use NixlConnector.")
