"""Medians, quantiles, and comparisons of samples that were taken in turns."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

_T = TypeVar("_T")
_RESAMPLES = 1000
_LOW, _HIGH = 0.025, 0.975


@dataclass(frozen=True)
class Estimate:
    """A statistic of a sample, and its bounds in 95 of 100 resamplings of that sample."""

    value: float
    low: float
    high: float


def median(values: Sequence[float]) -> float:
    """Return the middle value. Raises ValueError if there are no values."""
    if not values:
        raise ValueError("there are no values to take the median of")
    return statistics.median(values)


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value below which ``share`` (0 to 1) of the sample lies, interpolated between neighbours."""
    if not values:
        raise ValueError("there are no values to take a quantile of")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    lower = math.floor(place)
    upper = min(lower + 1, len(ordered) - 1)
    return ordered[lower] + (ordered[upper] - ordered[lower]) * (place - lower)


def median_of(values: Sequence[float], *, seed: int = 0) -> Estimate:
    """Estimate the median of a single sample."""
    return bootstrap(values, median, seed)


def mean_of(values: Sequence[float], *, seed: int = 0) -> Estimate:
    """Estimate the mean of consecutive time windows."""
    return bootstrap(values, statistics.fmean, seed)


def paired_ratio(baseline: Sequence[float], other: Sequence[float], *, seed: int = 0) -> Estimate:
    """Estimate the median over pairs of other/baseline. The two values of a pair were taken one right after the other."""
    return bootstrap([b / a for a, b in zip(baseline, other, strict=True)], median, seed)


def paired_difference(baseline: Sequence[float], other: Sequence[float], *, seed: int = 0) -> Estimate:
    """Estimate the median over pairs of other - baseline, in the samples' unit."""
    return bootstrap([b - a for a, b in zip(baseline, other, strict=True)], median, seed)


def quantile_ratio(
    baseline: Sequence[Sequence[float]], other: Sequence[Sequence[float]], share: float, *, seed: int = 0
) -> Estimate:
    """Estimate the ratio of a quantile of all values of ``other`` to that of ``baseline``.

    Values are given in rounds, and whole rounds are resampled, because the values of one round depend on each other.
    """

    def ratio(rounds: Sequence[tuple[Sequence[float], Sequence[float]]]) -> float:
        before = [value for a, _ in rounds for value in a]
        after = [value for _, b in rounds for value in b]
        return quantile(after, share) / quantile(before, share)

    return bootstrap(list(zip(baseline, other, strict=True)), ratio, seed)


def bootstrap(sample: Sequence[_T], statistic: Callable[[Sequence[_T]], float], seed: int) -> Estimate:
    """Compute the statistic and its bootstrap bounds; the same seed gives the same bounds."""
    return with_bounds(statistic(sample), [statistic(chosen) for chosen in resamples(sample, seed)])


def resamples(sample: Sequence[_T], seed: int) -> Iterator[list[_T]]:
    """Yield what the bootstrap draws from a sample; the same seed gives the same."""
    generator = random.Random(seed)
    for _ in range(_RESAMPLES):
        yield generator.choices(sample, k=len(sample))


def with_bounds(value: float, resampled: Sequence[float]) -> Estimate:
    """Return a value with its bounds, given what it is for each resample."""
    return Estimate(value, quantile(resampled, _LOW), quantile(resampled, _HIGH))
