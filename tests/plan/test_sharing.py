"""How work shares a device."""

from __future__ import annotations

import pytest

from chiasm.plan.sharing import NICE_5_WEIGHT, NORMAL_WEIGHT, SharedDevice, Stage, Work


def work(
    seconds: float, *, threads: int = 2, weight: float = NORMAL_WEIGHT, adapts: bool = True, stage: Stage = Stage.DECODE
) -> Work:
    """Work of so many core-seconds, which more threads divide evenly."""
    return Work(lambda count: seconds / count, lambda: None, stage, weight, threads, adapts)


def finished(device: SharedDevice) -> list[tuple[Work, float]]:
    """All work in the order in which it ends, and when."""
    found: list[tuple[Work, float]] = []
    while (end := device.next_end()) is not None:
        found += [(one, end) for one in device.advance(end)]
    return found


def ends(device: SharedDevice) -> list[object]:
    return [pytest.approx(when) for _, when in finished(device)]


def test_work_alone_has_all_cores() -> None:
    device = SharedDevice(2)
    device.start(work(2.0), 0.0)
    assert ends(device) == [1.0]


def test_work_takes_no_more_threads_than_it_has() -> None:
    device = SharedDevice(4)
    device.start(work(2.0, threads=1), 0.0)
    assert ends(device) == [2.0]


def test_what_serves_takes_no_core_from_the_count_and_half_of_one_from_a_thread() -> None:
    """Two threads go on, and one of them shares its core: the work is as slow as that one."""
    device = SharedDevice(2)
    step, serving = work(2.0), work(0.5, threads=1, stage=Stage.SERVE)
    device.start(step, 0.0)
    device.start(serving, 0.0)
    found = finished(device)
    assert [one for one, _ in found] == [serving, step]
    assert [when for _, when in found] == [pytest.approx(0.75), pytest.approx(1.375)]


def test_what_serves_has_a_core_beside_work_on_one() -> None:
    device = SharedDevice(2)
    device.start(work(1.0, threads=1), 0.0)
    device.start(work(0.5, threads=1, stage=Stage.SERVE), 0.0)
    assert ends(device) == [0.5, 1.0]


def test_two_share_the_cores_and_the_rest_has_all_again() -> None:
    device = SharedDevice(2)
    device.start(work(1.0), 0.0)
    device.start(work(3.0), 0.0)
    assert ends(device) == [1.0, 2.0]


def test_what_gives_way_gets_its_least_share_of_a_full_core() -> None:
    device = SharedDevice(1)
    device.start(work(1.0, threads=1), 0.0)
    device.start(work(1.0, threads=1, weight=NICE_5_WEIGHT), 0.0)
    first, second = finished(device)
    assert first[1] == pytest.approx(1 + NICE_5_WEIGHT / NORMAL_WEIGHT)
    assert second[1] == pytest.approx(2.0)


def test_nothing_gives_way_while_there_are_cores_for_all() -> None:
    device = SharedDevice(2)
    device.start(work(1.0, threads=1), 0.0)
    device.start(work(1.0, threads=1, weight=NICE_5_WEIGHT), 0.0)
    assert ends(device) == [1.0, 1.0]


def test_no_work_has_more_than_one_core_for_a_thread() -> None:
    device = SharedDevice(2)
    heavy = work(1.0, threads=1)
    light = [work(1.0, threads=1, weight=NORMAL_WEIGHT / 100) for _ in range(2)]
    for one in (heavy, *light):
        device.start(one, 0.0)
    device.advance(0.0)
    assert heavy.share == pytest.approx(1.0)
    assert [one.share for one in light] == [pytest.approx(0.5)] * 2


def test_fixed_threads_that_are_too_many_share_the_cores() -> None:
    device = SharedDevice(2)
    for _ in range(2):
        device.start(work(2.0, adapts=False), 0.0)
    assert ends(device) == [2.0, 2.0]


def test_busy_neighbours_slow_a_core_down() -> None:
    device = SharedDevice(2, busy_factor=1.5)
    for _ in range(2):
        device.start(work(1.0, threads=1), 0.0)
    assert ends(device) == [1.5, 1.5]


def test_time_in_use_is_counted_by_stage() -> None:
    device = SharedDevice(2)
    device.start(work(1.0, threads=1, stage=Stage.ENCODE), 0.0)
    device.start(work(2.0, threads=1), 0.0)
    finished(device)
    assert device.busy_seconds[Stage.ENCODE] == pytest.approx(0.5)
    assert device.busy_seconds[Stage.DECODE] == pytest.approx(1.0)
