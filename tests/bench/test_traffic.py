"""What open-loop requests ask for and when they arrive."""

from __future__ import annotations

import random
import statistics
from itertools import pairwise

import pytest

from chiasm.bench.traffic import ARRIVAL_CV, BURST_FACTOR, MIXES, Mix, Shape, arrivals, with_bursts


def _gaps(times: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(times)]


def test_gaps_between_arrivals_vary_as_much_as_they_shall() -> None:
    gaps = _gaps(arrivals(random.Random(0), 40_000))
    assert statistics.fmean(gaps) == pytest.approx(1.0, rel=0.01)
    assert statistics.stdev(gaps) / statistics.fmean(gaps) == pytest.approx(ARRIVAL_CV, rel=0.05)


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_the_same_seed_gives_the_same_requests(mix: Mix) -> None:
    assert mix.pattern(3) == mix.pattern(3)
    assert mix.pattern(3) != mix.pattern(4)


@pytest.mark.parametrize("mix", MIXES.values(), ids=lambda mix: mix.name)
def test_arrivals_are_in_order_and_one_per_second(mix: Mix) -> None:
    times = [arrival.time for arrival in mix.pattern(0)]
    assert times[0] == 0.0
    assert times == sorted(times)
    assert times[-1] <= mix.requests


def test_images_have_the_shape_of_the_published_trace() -> None:
    numbers = [len(one.shape.images) for seed in range(100) for one in MIXES["images"].pattern(seed)]
    assert statistics.fmean(numbers) == pytest.approx(1.5, rel=0.05)
    assert numbers.count(1) / len(numbers) == pytest.approx(0.74, abs=0.03)


def test_three_in_ten_of_the_mixed_requests_have_images() -> None:
    shapes = [one.shape for seed in range(100) for one in MIXES["mixed"].pattern(seed)]
    assert sum(bool(shape.images) for shape in shapes) / len(shapes) == pytest.approx(0.3, abs=0.03)


def test_heavy_requests_have_four_to_eight_images() -> None:
    assert {len(one.shape.images) for seed in range(20) for one in MIXES["heavy"].pattern(seed)} == {4, 5, 6, 7, 8}


def test_some_images_are_asked_about_again() -> None:
    ids = [name for one in MIXES["repeats"].pattern(0) for name in one.shape.image_ids]
    assert len(ids) == MIXES["repeats"].requests
    assert len(set(ids)) < len(ids)


def test_bursts_are_ten_times_as_fast_and_take_no_longer_altogether() -> None:
    even = [float(number) for number in range(480)]
    times = with_bursts(even)
    gaps = _gaps(times)
    assert max(gaps) / min(gaps) == pytest.approx(BURST_FACTOR)
    assert with_bursts([0.0, 48.0, 96.0]) == pytest.approx([0.0, 48.0, 96.0])
    assert times == sorted(times)


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        (Shape(1, (), 1), "text up to 64 tokens"),
        (Shape(64, (), 1), "text up to 64 tokens"),
        (Shape(65, (), 1), "text up to 128 tokens"),
        (Shape(30, ((512, 512),), 1), "images up to 512 tokens"),
        (Shape(1, ((1, 1),), 1), "images up to 64 tokens"),
    ],
)
def test_classes_hold_requests_of_about_the_same_size(shape: Shape, name: str) -> None:
    assert shape.size_class == name
