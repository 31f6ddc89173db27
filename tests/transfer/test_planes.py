"""What every data plane does: the bytes that were asked for arrive, and nothing else is written."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from chiasm.transfer.errors import TransferError
from chiasm.transfer.memory import DataPlane, Memory, ReachedMemory, Run
from chiasm.transfer.nixl import MODULES, NixlPlane
from chiasm.transfer.shared_memory import SharedMemoryPlane
from chiasm.transfer.tcp import TcpPlane

from .holder import NUM_BYTES, Holder

NEEDS_NIXL = pytest.mark.skipif(
    not any(importlib.util.find_spec(name) for name in MODULES), reason="NIXL is not installed"
)
SHIFT = 12_345
"""The offered memory doesn't begin at a page."""


@pytest.fixture(
    scope="module",
    params=[
        "shared memory",
        "tcp",
        pytest.param("nixl", marks=NEEDS_NIXL),
        pytest.param("nixl over TCP", marks=NEEDS_NIXL),
    ],
)
def make_plane(request: pytest.FixtureRequest) -> Iterator[Callable[[], DataPlane]]:
    name, _, way = request.param.partition(" over ")
    makers: dict[str, Callable[[], DataPlane]] = {
        "shared memory": SharedMemoryPlane,
        "tcp": TcpPlane,
        "nixl": lambda: NixlPlane("test"),
    }
    with pytest.MonkeyPatch.context() as patch:
        if way:
            patch.setenv("UCX_TLS", way.lower())
        yield makers[name]


@pytest.fixture(scope="module")
def holder(make_plane: Callable[[], DataPlane]) -> Iterator[Holder]:
    holder = Holder(make_plane(), shift=SHIFT)
    yield holder
    holder.close()


class Target:
    """A reader's memory, and what it reaches."""

    def __init__(self, holder: Holder, plane: DataPlane) -> None:
        self.bytes = np.full(NUM_BYTES, 7, np.uint8)
        self.memory = Memory(self.bytes.ctypes.data, NUM_BYTES, owner=self.bytes)
        plane.prepare(self.memory)
        self.holder = holder
        self.reached: ReachedMemory = holder.reach(plane, self.memory)

    def read(
        self,
        *runs: Run,
        stop: Callable[[], bool] = lambda: False,
        received: Callable[[int], None] = lambda num_bytes: None,
    ) -> bool:
        """Read, while the holder does its part."""
        if self.holder.offered.progress_seconds is None:
            return self.reached.read(runs, stop, received)
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(self.reached.read, runs, stop, received)
            while not reading.done():
                self.holder.offered.progress()
            return reading.result()

    def expect(self, *runs: Run) -> None:
        """What was read is the holder's, and the rest is as it was."""
        expected = np.full(NUM_BYTES, 7, np.uint8)
        for run in runs:
            expected[run.local : run.local + run.num_bytes] = self.holder.bytes[run.remote : run.remote + run.num_bytes]
        assert np.array_equal(self.bytes, expected)


@pytest.fixture(scope="module")
def only_target(holder: Holder, make_plane: Callable[[], DataPlane]) -> Iterator[Target]:
    target = Target(holder, make_plane())
    yield target
    target.reached.close()


@pytest.fixture
def target(only_target: Target) -> Target:
    only_target.bytes[:] = 7
    return only_target


def test_scattered_runs(target: Target) -> None:
    runs = [Run(5, 1000, 3), Run(100_000, 0, 70_001), Run(17, 30_000_000, 1), Run(0, 2, 5), Run(9, 2, 1)]
    assert target.read(*runs)
    target.expect(*runs)


def test_everything_in_one_run(target: Target) -> None:
    assert target.read(Run(0, 0, NUM_BYTES))
    target.expect(Run(0, 0, NUM_BYTES))


def test_what_is_said_to_be_here_is_here_already(target: Target) -> None:
    here = 0

    def received(num_bytes: int) -> None:
        nonlocal here
        is_right = np.array_equal(target.bytes[here : here + num_bytes], target.holder.bytes[here : here + num_bytes])
        here += num_bytes if is_right else 0

    assert target.read(Run(0, 0, NUM_BYTES), received=received)
    assert here == NUM_BYTES


def test_more_runs_than_go_at_once(target: Target) -> None:
    runs = [Run(n * 100, (n * 7919 % 30_000) * 101, 99) for n in range(20_000)]
    assert target.read(*runs)
    target.expect(*runs)


def test_one_read_after_another(target: Target) -> None:
    runs = [Run(n * 1000, n * 5000, 1000) for n in range(50)]
    for run in runs:
        assert target.read(run)
    target.expect(*runs)


def test_reads_at_the_same_time(target: Target) -> None:
    size = 1 << 20
    runs = [Run(n * size, (29 - n) * size, size) for n in range(30)]
    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(target.read, runs))
    target.expect(*runs)


def test_nothing_is_read_if_it_is_stopped_before(target: Target) -> None:
    assert not target.read(Run(0, 0, 1000), stop=lambda: True)
    target.expect()


def test_a_read_that_is_stopped_in_the_middle_writes_nothing_later(target: Target) -> None:
    answers = iter([False])
    assert not target.read(Run(0, 0, NUM_BYTES), stop=lambda: next(answers, True))
    target.bytes[:] = 7
    run = Run(0, 5, 1000)
    assert target.read(run)
    target.expect(run)


@pytest.mark.parametrize("run", [Run(0, NUM_BYTES, 1), Run(0, NUM_BYTES - 1, 2), Run(0, -1, 5), Run(0, 1 << 62, 1)])
def test_bytes_that_the_holder_does_not_have_are_refused(target: Target, run: Run) -> None:
    with pytest.raises(TransferError, match="does not have"):
        target.read(run)
    target.expect()


@pytest.mark.parametrize("description", [b"", b"\x80", b"\x91" * 100_000, bytes(range(256))], ids=range(4))
def test_a_description_that_is_none_is_refused(
    make_plane: Callable[[], DataPlane], holder: Holder, description: bytes
) -> None:
    array = np.zeros(10, np.uint8)
    with pytest.raises(TransferError):
        make_plane().reach(holder.peer, description, Memory(array.ctypes.data, 10, owner=array))
