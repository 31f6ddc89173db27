"""A connector inside one process whose copies stop before each run until a test lets them go on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch

from chiasm.kv_transfer.pull import PullConnector
from chiasm.transfer.memory import DataPlane, Memory, OfferedMemory, Peer, ReachedMemory, Run

from .instance import PATIENCE_SECONDS


class Gate:
    """Copies wait here; a test waits for them to come."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._is_open = False
        self._num_waiting = 0

    def close(self) -> None:
        self._is_open = False

    def open(self) -> None:
        with self._changed:
            self._is_open = True
            self._changed.notify_all()

    def wait_for(self, num_copies: int) -> None:
        """Until that many copies stand at the gate."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._num_waiting >= num_copies, PATIENCE_SECONDS)

    def pass_through(self, stop: Callable[[], bool]) -> bool:
        """What a copy does before each run; False if it is to stop."""
        with self._changed:
            self._num_waiting += 1
            self._changed.notify_all()
            while not self._is_open and not stop():
                self._changed.wait(0.001)
            self._num_waiting -= 1
        return not stop()


GATE = Gate()
_OFFERED: dict[bytes, torch.Tensor] = {}


def _bytes_of(memory: Memory) -> torch.Tensor:
    assert isinstance(memory.owner, torch.Tensor)
    return memory.owner.view(-1)


class Offered(OfferedMemory):
    def __init__(self, memory: Memory) -> None:
        self._key = str(memory.address).encode()
        _OFFERED[self._key] = _bytes_of(memory)

    def describe(self, reader: int) -> bytes:
        return self._key

    def close(self) -> None:
        del _OFFERED[self._key]


class Reached(ReachedMemory):
    def __init__(self, here: torch.Tensor, there: torch.Tensor) -> None:
        self._here = here
        self._there = there

    def read(
        self, runs: Sequence[Run], stop: Callable[[], bool], received: Callable[[int], None] = lambda num_bytes: None
    ) -> bool:
        for local, remote, num_bytes in runs:
            if not GATE.pass_through(stop):
                return False
            self._here[local : local + num_bytes] = self._there[remote : remote + num_bytes]
        return True

    def close(self) -> None:
        pass


class GatedPlane(DataPlane):
    def offer(self, memory: Memory) -> OfferedMemory:
        return Offered(memory)

    def reach(self, peer: Peer, description: bytes, memory: Memory) -> ReachedMemory:
        return Reached(_bytes_of(memory), _OFFERED[description])


class GatedConnector(PullConnector):
    def make_plane(self) -> DataPlane:
        return GatedPlane()
