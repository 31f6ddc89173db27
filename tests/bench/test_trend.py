"""Whether a series grows."""

from __future__ import annotations

import random

from chiasm.bench.trend import growth


def noisy(slope: float, seed: int, peaks: bool = True) -> list[float]:
    """A series that grows by ``slope`` from its beginning to its end, with noise and peaks."""
    generator = random.Random(seed)
    return [
        100 + slope * index / 99 + generator.gauss(0, 2) + (500 if peaks and generator.random() < 0.05 else 0)
        for index in range(100)
    ]


def test_a_series_that_grows_is_told_with_its_growth() -> None:
    for seed in range(20):
        found = growth(noisy(50, seed))
        assert found is not None
        assert 40 < found < 60


def test_noise_and_peaks_are_no_growth() -> None:
    assert sum(growth(noisy(0, seed)) != 0 for seed in range(200)) < 10


def test_what_falls_or_stays_does_not_grow() -> None:
    assert growth(noisy(-50, 0)) == 0
    assert growth([7.0] * 50) == 0


def test_a_count_that_rises_now_and_then_grows() -> None:
    found = growth([float(index // 30) for index in range(100)])
    assert found is not None
    assert 2 < found < 5


def test_few_samples_say_nothing() -> None:
    assert growth([1.0, 2.0, 3.0]) is None
