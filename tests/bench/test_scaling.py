"""Encoders that come and go, simulated with the policies of the proxy and of ``serve``. Nothing here takes real time."""

from __future__ import annotations

import random

import pytest

from chiasm.bench.burst import Wave
from chiasm.bench.routing import PIXELS, Image
from chiasm.bench.scaling import Fleet, Scaled, ScalingSimulation, images_of, lone_requests

HALF_HOUR = Wave(seconds=1800.0, burst_at=300.0)
LOAD = 0.2


def simulated(fleet: Fleet) -> Scaled:
    return ScalingSimulation(fleet).follow(images_of(HALF_HOUR, LOAD, seed=0), HALF_HOUR.seconds)


@pytest.fixture(scope="module")
def held() -> Scaled:
    return simulated(Fleet(4, 4))


@pytest.fixture(scope="module")
def scaled() -> Scaled:
    return simulated(Fleet(1, 4, start_seconds=1.5))


def test_in_a_burst_at_most_3_points_are_late_and_40_percent_of_the_encoder_seconds_are_saved(
    held: Scaled, scaled: Scaled
) -> None:
    assert held.encoder_seconds == 4 * HALF_HOUR.seconds
    assert held.in_time() - scaled.in_time() <= 0.03
    assert scaled.encoder_seconds <= 0.6 * held.encoder_seconds


def test_every_image_is_encoded_while_encoders_come_and_go(scaled: Scaled) -> None:
    assert set(scaled.routed.seconds_of) == {one.identifier for one in scaled.images}


def test_they_come_together_in_the_burst_and_go_one_by_one_after_a_calm_while(scaled: Scaled) -> None:
    came = [one for one in scaled.changes if HALF_HOUR.is_in_burst(one.when)]
    assert came[-1].encoders == 4
    assert came[-1].when < HALF_HOUR.burst_at + 5
    went = [one for one in scaled.changes if one.when > came[-1].when]
    assert [one.encoders for one in went] == [3, 2, 1]
    assert went[0].when > HALF_HOUR.burst_at + HALF_HOUR.burst_seconds + Fleet.calm_seconds


def test_requests_that_are_done_before_an_encoder_could_start_start_none() -> None:
    lone = lone_requests(HALF_HOUR.seconds, 60.0, 8, seed=0)
    scaled = ScalingSimulation(Fleet(1, 4, start_seconds=1.5)).follow(lone, HALF_HOUR.seconds)
    assert [one.encoders for one in scaled.changes] == [1]
    assert len(scaled.routed.seconds_of) == len(lone)


def test_a_request_gets_no_more_encoders_than_it_has_images() -> None:
    large = [Image(100.0, f"image {number}", 50 * PIXELS) for number in range(3)]
    scaled = ScalingSimulation(Fleet(1, 8, start_seconds=1.5)).follow(large, 200.0)
    assert [one.encoders for one in scaled.changes] == [1, 3]


def test_the_same_images_give_the_same_figures(scaled: Scaled) -> None:
    again = simulated(Fleet(1, 4, start_seconds=1.5))
    assert (again.in_time(), again.encoder_seconds, again.changes) == (
        scaled.in_time(),
        scaled.encoder_seconds,
        scaled.changes,
    )


def test_in_a_burst_so_many_times_as_many_requests_come() -> None:
    wave = Wave(seconds=300.0, burst_at=100.0, burst_seconds=30.0, factor=10.0)
    times = wave.times(20.0, random.Random(0))
    assert times == sorted(times)
    assert times[0] > 0
    assert times[-1] < wave.seconds
    within = sum(map(wave.is_in_burst, times))
    assert within / wave.burst_seconds == pytest.approx(200, rel=0.1)
    assert (len(times) - within) / (wave.seconds - wave.burst_seconds) == pytest.approx(20, rel=0.1)
