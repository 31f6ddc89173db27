"""Threads that share cores see each other and divide the cores."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
import torch
from torch import nn

from chiasm.engine.core_sharing import SLOTS, CoreShare, Crowding
from chiasm.errors import ConfigurationError
from chiasm.models.products import product


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that has shown itself counts, however long the machine pauses between two lines of a test.

    Nothing is longer ago than the start of the clock, which is that of the machine.
    """
    monkeypatch.setattr("chiasm.engine.core_sharing._LONG_AGO_NS", time.monotonic_ns())


@pytest.fixture(params=["a file", "one process"])
def share(request: pytest.FixtureRequest, tmp_path: Path) -> CoreShare:
    return CoreShare(tmp_path / "cores" if request.param == "a file" else None, 4)


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """What threads had before doesn't count."""
    monkeypatch.setattr("chiasm.engine.core_sharing._RECENT_NS", -1)


def test_a_thread_that_computes_alone_has_all_cores(share: CoreShare) -> None:
    with share.worker().computing():
        assert torch.get_num_threads() == 4


def test_threads_that_compute_at_the_same_time_divide_the_cores(share: CoreShare) -> None:
    now = time.monotonic_ns()
    for slot in range(3):
        share.show(slot, now)
    assert [share.part_of(slot, now) for slot in range(3)] == [2, 1, 1]


def test_each_thread_has_a_core_even_if_there_are_fewer_cores_than_threads(share: CoreShare) -> None:
    now = time.monotonic_ns()
    for slot in range(9):
        share.show(slot, now)
    assert {share.part_of(slot, now) for slot in range(9)} == {1}


def test_work_with_small_layers_is_computed_on_one_core_and_leaves_the_others(share: CoreShare) -> None:
    small, large = share.worker(), share.worker()
    small.follow(nn.Sequential(nn.ModuleList([nn.Linear(1, 1) for _ in range(10)])))
    with small.computing(seconds=0.01):
        assert torch.get_num_threads() == 1
        with large.computing(seconds=1.0):
            assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("forgetful")
def test_a_thread_that_no_longer_computes_leaves_its_cores_to_the_others(share: CoreShare) -> None:
    first, second = share.worker(), share.worker()
    with first.computing():
        with second.computing():
            assert torch.get_num_threads() == 2
        second.rest()
        now = time.monotonic_ns()
        assert share.part_of(0, now) == 4


@pytest.mark.usefixtures("forgetful")
def test_a_thread_keeps_its_cores_between_two_pieces_of_work(share: CoreShare) -> None:
    first, second = share.worker(), share.worker()
    for _ in range(2):
        with first.computing():
            pass
        with second.computing():
            assert torch.get_num_threads() == 2
    first.rest()
    with second.computing():
        assert torch.get_num_threads() == 4


def test_steady_work_also_leaves_cores_to_threads_that_have_just_computed(share: CoreShare) -> None:
    now, second = time.monotonic_ns(), 1_000_000_000
    share.show(1, now, ended=True)
    share.show(2, now, alone=True, ended=True)
    assert share.part_of(0, now) == 4
    assert share.part_of(0, now + second - 1, steady=True) == 2
    assert share.part_of(0, now + second, steady=True) == 4


def test_no_thread_takes_more_than_the_smallest_part_within_the_last_second(share: CoreShare) -> None:
    now, second = time.monotonic_ns(), 1_000_000_000
    share.show(1, now)
    assert share.part_of(0, now) == 2
    share.show(1, now, ended=True)
    assert share.part_of(0, now + 1) == 2
    assert share.part_of(2, now + second) == 2
    assert share.part_of(2, now + second + 1) == 4


def test_encoders_may_compute_for_one_request_and_are_not_remembered(share: CoreShare) -> None:
    now = time.monotonic_ns()
    share.show(1, now, encodes=True)
    assert share.part_of(0, now) == 2
    share.show(1, now, ended=True, encodes=True)
    assert share.part_of(0, now) == 4


def test_a_core_that_was_taken_lately_is_left_free(share: CoreShare) -> None:
    now = time.monotonic_ns()
    share.show(1, now, alone=True)
    assert share.part_of(0, now) == 3
    share.show(1, now, ended=True)
    assert share.part_of(0, now) == 3


def test_threads_that_compute_one_after_the_other_have_all_cores(share: CoreShare) -> None:
    first, second = share.worker(), share.worker()
    for worker in (first, second, first):
        with worker.computing():
            assert torch.get_num_threads() == 4
        worker.rest()


def test_a_thread_counts_for_steady_work_after_it_has_ended(share: CoreShare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chiasm.engine.core_sharing._RECENT_NS", time.monotonic_ns())  # the machine may be busy
    first, second = share.worker(), share.worker()
    with first.computing():
        pass
    first.rest()
    with second.computing(steady=True):
        assert torch.get_num_threads() == 2
    with second.computing():
        assert torch.get_num_threads() == 4


@pytest.mark.usefixtures("forgetful")
def test_a_thread_follows_its_part_within_a_layer(share: CoreShare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chiasm.engine.core_sharing._INTERVAL_NS", 0)
    monkeypatch.setattr("chiasm.engine.core_sharing._MOST_WAITING", 1.0)  # the machine may be busy
    first, second = share.worker(), share.worker()
    compute, _ = product(torch.randn(3, 2), None)
    rows = torch.randn(1, 2)
    with first.computing():
        assert torch.get_num_threads() == 4
        share.show(1, time.monotonic_ns())
        compute(rows)
        assert torch.get_num_threads() == 2
        second.rest()
        compute(rows)
        assert torch.get_num_threads() == 4


def test_a_thread_follows_its_part_before_the_first_layer(share: CoreShare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chiasm.engine.core_sharing._INTERVAL_NS", 0)
    monkeypatch.setattr("chiasm.engine.core_sharing._MOST_WAITING", 1.0)  # the machine may be busy
    model = nn.ModuleDict({"embed": nn.Embedding(2, 2), "layers": nn.ModuleList([nn.Linear(2, 2)])})
    worker = share.worker()
    worker.follow(model)
    with worker.computing():
        share.show(1, time.monotonic_ns())
        model["embed"](torch.zeros(1, dtype=torch.int64))
        assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("forgetful")
def test_a_thread_follows_its_part_from_layer_to_layer(share: CoreShare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chiasm.engine.core_sharing._INTERVAL_NS", 0)
    monkeypatch.setattr("chiasm.engine.core_sharing._MOST_WAITING", 1.0)  # the machine may be busy
    seen: list[int] = []

    class Layer(nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            seen.append(torch.get_num_threads())
            share.show(1, time.monotonic_ns() if len(seen) == 1 else 0)  # another computes during the second layer
            return hidden

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Layer(), Layer(), Layer()])

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                hidden = layer(hidden)
            return hidden

    model = Model()
    worker = share.worker()
    worker.follow(model)
    with worker.computing():
        model(torch.zeros(1))
    assert seen == [4, 2, 4]


# ---- who else wants the cores ------------------------------------------------------------------------------------------

_MS = 1_000_000


def test_a_thread_that_waits_much_on_several_cores_uses_half_of_them_for_a_while() -> None:
    crowding = Crowding()
    crowding.note(threads=8, passed=20 * _MS, computed=10 * _MS, now=0)
    assert crowding.most(0) == 4
    assert crowding.most(99 * _MS) == 4
    assert crowding.most(100 * _MS) is None


def test_a_thread_that_waits_little_keeps_its_cores() -> None:
    crowding = Crowding()
    crowding.note(threads=2, passed=20 * _MS, computed=18 * _MS, now=0)
    assert crowding.most(0) is None


def test_a_short_wait_within_much_computing_does_not_count() -> None:
    crowding = Crowding()
    crowding.note(threads=2, passed=4 * _MS, computed=0, now=0)
    crowding.note(threads=2, passed=16 * _MS, computed=16 * _MS, now=0)
    assert crowding.most(0) is None


def test_waiting_on_one_core_says_nothing_about_several() -> None:
    crowding = Crowding()
    crowding.note(threads=1, passed=20 * _MS, computed=1 * _MS, now=0)
    assert crowding.most(0) is None


def test_the_pause_is_twice_as_long_each_time_in_a_row_up_to_a_bound_and_shrinks_again() -> None:
    crowding = Crowding()
    now, pauses = 0, []
    for computed in (0, 0, 0, 0, 0, 0, 0, 20, 20, 0):
        crowding.note(threads=2, passed=20 * _MS, computed=computed * _MS, now=now)
        began = now
        while crowding.most(now) is not None:
            now += 50 * _MS
        pauses.append((now - began) // _MS)
    assert pauses == [100, 200, 400, 800, 1600, 3200, 3200, 0, 0, 1600]


class Clock:
    """Of a thread that computes all the time unless it is told that it waits."""

    def __init__(self) -> None:
        self.waited_ns = 0
        self._computed_ns = time.monotonic_ns()

    def monotonic_ns(self) -> int:
        self._computed_ns += 1000
        return self._computed_ns + self.waited_ns

    def thread_time_ns(self) -> int:
        return self._computed_ns


def test_a_thread_whose_layer_waits_computes_the_next_one_on_fewer_cores(
    share: CoreShare, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr("chiasm.engine.core_sharing.time", clock)
    seen: list[int] = []

    class Layer(nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            seen.append(torch.get_num_threads())
            clock.waited_ns += 30 * _MS  # as long as another program has the cores
            return hidden

    model = nn.ModuleList([Layer(), Layer(), Layer()])
    worker = share.worker()
    worker.follow(nn.Sequential(model))
    with worker.computing():
        for layer in model:
            layer(torch.zeros(1))
    assert seen == [4, 2, 1]


def test_a_model_that_runs_outside_the_block_keeps_its_threads(share: CoreShare) -> None:
    model = nn.Sequential(nn.ModuleList([nn.Linear(1, 1)]))
    share.worker().follow(model)
    torch.set_num_threads(1)
    model[0][0](torch.zeros(1))  # type: ignore[index]
    assert torch.get_num_threads() == 1


@pytest.mark.usefixtures("forgetful")
def test_instances_in_several_processes_see_each_other(tmp_path: Path) -> None:
    computing, done, process = _another_process(tmp_path / "cores")
    assert computing.wait(60)
    worker = CoreShare(tmp_path / "cores", 4).worker()
    with worker.computing():
        assert torch.get_num_threads() == 2
    done.set()
    process.join(60)
    with worker.computing():
        assert torch.get_num_threads() == 4


def test_the_slot_of_a_process_that_was_killed_is_given_to_the_next_thread(tmp_path: Path) -> None:
    computing, _, process = _another_process(tmp_path / "cores")
    assert computing.wait(60)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    share = CoreShare(tmp_path / "cores", 4)
    with share.worker().computing():
        assert torch.get_num_threads() == 4


def test_a_thread_that_showed_itself_long_ago_does_not_count(share: CoreShare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chiasm.engine.core_sharing._LONG_AGO_NS", 1_000)
    share.show(1, time.monotonic_ns() - 2_000)
    assert share.part_of(0, time.monotonic_ns()) == 4


def test_what_was_shown_before_the_machine_has_started_does_not_count(tmp_path: Path) -> None:
    clock_before = time.monotonic_ns() + 3600 * 10**9
    earlier = CoreShare(tmp_path / "cores", 4)
    for slot in (1, 2):
        earlier.show(slot, clock_before)
    assert earlier.part_of(1, clock_before) == 2
    with CoreShare(tmp_path / "cores", 4).worker().computing():
        assert torch.get_num_threads() == 4


def test_more_threads_than_there_are_slots_are_refused(share: CoreShare) -> None:
    for _ in range(SLOTS):
        share.worker()
    with pytest.raises(ConfigurationError, match="run fewer instances"):
        share.worker()


def test_a_file_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be opened"):
        CoreShare(tmp_path / "missing" / "cores", 4)


def test_a_file_for_which_there_is_no_room_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*ignored: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(ConfigurationError, match="No space left on device"):
        CoreShare(tmp_path / "cores", 4)


def _another_process(path: Path) -> tuple[Event, Event, multiprocessing.process.BaseProcess]:
    context = multiprocessing.get_context("spawn")
    computing, done = context.Event(), context.Event()
    process = context.Process(target=_compute, args=(path, computing, done), daemon=True)
    process.start()
    return computing, done, process


def _compute(path: Path, computing: Event, done: Event) -> None:
    worker = CoreShare(path, 4).worker()
    with worker.computing():
        computing.set()
        done.wait(60)
    worker.rest()


@pytest.mark.parametrize("mode", [0o606, 0o660])
def test_a_file_that_others_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "cores"
    path.touch()
    path.chmod(mode)
    with pytest.raises(ConfigurationError, match="is writable by"):
        CoreShare(path, 4)


def test_a_link_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cores").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigurationError, match="cannot be opened"):
        CoreShare(tmp_path / "cores", 4)
