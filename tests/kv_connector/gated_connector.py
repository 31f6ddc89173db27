"""A connector inside one process whose copies stop before each block until a test lets them go on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch

from chiasm.kv_transfer.base import OfferedMemory, ReachedMemory
from chiasm.kv_transfer.control import Welcome
from chiasm.kv_transfer.pull import PullConnector

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
        """What a copy does before each block; False if it is to stop."""
        with self._changed:
            self._num_waiting += 1
            self._changed.notify_all()
            while not self._is_open and not stop():
                self._changed.wait(0.001)
            self._num_waiting -= 1
        return not stop()


GATE = Gate()
_OFFERED: dict[bytes, torch.Tensor] = {}


class Offered(OfferedMemory):
    def __init__(self, blocks: torch.Tensor) -> None:
        self._key = str(blocks.data_ptr()).encode()
        _OFFERED[self._key] = blocks

    def description(self) -> bytes:
        return self._key

    def close(self) -> None:
        del _OFFERED[self._key]


class Reached(ReachedMemory):
    def __init__(self, local_blocks: torch.Tensor, remote_blocks: torch.Tensor) -> None:
        self._local_blocks = local_blocks
        self._remote_blocks = remote_blocks

    def read(self, local: Sequence[int], remote: Sequence[int], stop: Callable[[], bool]) -> bool:
        for target, source in zip(local, remote, strict=True):
            if not GATE.pass_through(stop):
                return False
            self._local_blocks[target] = self._remote_blocks[source]
        return True

    def close(self) -> None:
        pass


class GatedConnector(PullConnector):
    def offer(self, blocks: torch.Tensor) -> OfferedMemory:
        return Offered(blocks)

    def prepare(self, blocks: torch.Tensor) -> None:
        self._blocks = blocks

    def reach(self, welcome: Welcome) -> ReachedMemory:
        return Reached(self._blocks, _OFFERED[welcome.memory])
