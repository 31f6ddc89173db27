"""How many encoders there should be, by what the proxy desires and by starts that have failed."""

from __future__ import annotations

from chiasm.launch.scaling import FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS, EncoderNumber

STEP = 60.0


def number(least: int = 1, most: int = 4) -> EncoderNumber:
    return EncoderNumber(least, most, STEP)


def test_there_are_the_fewest_before_the_proxy_says_anything() -> None:
    assert number(2, 4).target == 2


def test_there_are_more_at_once_and_no_more_than_the_most() -> None:
    one = number()
    assert one.follow(2.1, 0.0) == 3
    assert one.follow(100.0, 0.0) == 4


def test_a_trace_beyond_a_whole_number_needs_no_further_encoder() -> None:
    assert number().follow(2.0 + 1e-9, 0.0) == 2


def test_there_is_one_fewer_after_each_step_and_no_fewer_than_the_fewest() -> None:
    one = number(2, 4)
    one.follow(4.0, 0.0)
    assert [one.follow(0.0, now) for now in (1.0, STEP, STEP + 1, 2 * STEP, 2 * STEP + 1, 9 * STEP)] == [
        4,
        4,
        3,
        3,
        2,
        2,
    ]


def test_need_that_returns_begins_the_step_anew() -> None:
    one = number()
    one.follow(2.0, 0.0)
    one.follow(0.0, 1.0)
    one.follow(1.5, STEP)
    assert one.follow(0.0, STEP + 2) == 2
    assert one.follow(0.0, 2 * STEP + 2) == 1


def test_a_start_that_fails_delays_the_next_twice_as_long_as_the_one_before() -> None:
    one, now = number(), 0.0
    pauses: list[float] = []
    while not pauses or pauses[-1] < LONGEST_PAUSE_SECONDS:
        pauses.append(one.note_failure(now))
        assert not one.may_start(now)
        now += pauses[-1]
        assert one.may_start(now)
    assert pauses[:3] == [FIRST_PAUSE_SECONDS, 2 * FIRST_PAUSE_SECONDS, 4 * FIRST_PAUSE_SECONDS]
    assert one.note_failure(now) == LONGEST_PAUSE_SECONDS


def test_starts_that_fail_together_count_as_one() -> None:
    one = number()
    assert one.note_failure(0.0) == FIRST_PAUSE_SECONDS
    assert one.note_failure(1.0) == FIRST_PAUSE_SECONDS - 1


def test_after_a_start_that_succeeds_the_delays_begin_anew() -> None:
    one = number()
    one.note_failure(0.0)
    one.note_success()
    assert one.note_failure(100.0) == FIRST_PAUSE_SECONDS
