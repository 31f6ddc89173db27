"""The time of a measurement, by an invented clock."""

from __future__ import annotations

import pytest

from chiasm.bench.budget import Budget


class _Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_what_one_part_leaves_the_later_ones_get() -> None:
    clock = _Clock()
    budget = Budget(60.0, clock)
    assert budget.part(3, rounds=1, tail_seconds=0.0).sending_seconds(1) == pytest.approx(20.0)
    clock.now += 10.0
    assert budget.part(2, rounds=1, tail_seconds=0.0).sending_seconds(1) == pytest.approx(25.0)
    clock.now += 60.0
    assert budget.left == 0.0


def test_rounds_and_trials_divide_the_time_of_a_part() -> None:
    clock = _Clock()
    part = Budget(60.0, clock).part(1, rounds=3, tail_seconds=1.0)
    assert part.sending_seconds(4) == pytest.approx(4.0)
    clock.now += 12.0
    part.end_round()
    assert part.sending_seconds(4) == pytest.approx(5.0)
    assert part.sending_seconds(2) == pytest.approx(11.0)


def test_what_trials_took_beyond_sending_is_expected_of_later_ones() -> None:
    clock = _Clock()
    part = Budget(60.0, clock).part(1, rounds=1, tail_seconds=1.0)
    part.took(5.0, sending_seconds=2.0)
    assert part.sending_seconds(2) == pytest.approx(28.0)


def test_a_round_that_would_not_end_in_time_has_no_room() -> None:
    clock = _Clock()
    part = Budget(60.0, clock).part(1, rounds=3, tail_seconds=1.0)
    assert part.has_room(4, 14.0)
    assert not part.has_room(4, 14.1)
    clock.now += 61.0
    assert part.sending_seconds(4) < 0
    assert not part.has_room(1, 0.0)


@pytest.mark.parametrize("trial_seconds", [1.0, 7.0, 40.0])
def test_a_measurement_whose_trials_take_as_long_as_expected_keeps_to_its_time(trial_seconds: float) -> None:
    clock = _Clock()
    budget = Budget(180.0, clock)
    for parts in (2, 1):
        part = budget.part(parts, rounds=3, tail_seconds=trial_seconds)
        for _ in range(3):
            if not part.has_room(4, 0.0):
                break
            for _ in range(4):
                clock.now += trial_seconds
                part.took(trial_seconds, sending_seconds=0.0)
            part.end_round()
    assert clock.now <= 280.0
