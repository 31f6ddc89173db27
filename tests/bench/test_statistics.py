"""Medians, quantiles and comparisons."""

from __future__ import annotations

import pytest

from chiasm.bench.statistics import (
    mean_of,
    median,
    median_of,
    paired_difference,
    paired_ratio,
    quantile,
    quantile_ratio,
)


def test_a_quantile_lies_between_its_neighbours() -> None:
    values = [4.0, 1.0, 3.0, 2.0, 5.0]
    assert quantile(values, 0) == 1
    assert quantile(values, 0.5) == median(values) == 3
    assert quantile(values, 0.6) == pytest.approx(3.4)
    assert quantile(values, 1) == 5


def test_no_values_have_no_median_and_no_quantile() -> None:
    with pytest.raises(ValueError, match="no values"):
        median([])
    with pytest.raises(ValueError, match="no values"):
        quantile([], 0.99)


def test_the_median_and_the_mean_lie_within_their_bounds() -> None:
    values = [1.0, 2.0, 3.0, 4.0, 40.0]
    middle, mean = median_of(values), mean_of(values)
    assert (middle.value, mean.value) == (3, 10)
    for estimate in (middle, mean):
        assert 1 <= estimate.low < estimate.value < estimate.high <= 40


def test_a_drift_that_affects_both_values_of_a_pair_does_not_change_the_ratio() -> None:
    baseline = [1.0, 2.0, 4.0, 8.0, 16.0]
    estimate = paired_ratio(baseline, [1.1 * value for value in baseline])
    assert estimate.value == pytest.approx(1.1)
    assert estimate.low == pytest.approx(1.1)
    assert estimate.high == pytest.approx(1.1)


def test_one_disturbed_pair_does_not_change_the_difference() -> None:
    estimate = paired_difference([10.0, 10.0, 10.0, 10.0, 10.0], [12.0, 12.0, 400.0, 12.0, 12.0])
    assert estimate.value == 2
    assert estimate.low == 2


def test_samples_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="argument 2"):
        paired_ratio([1.0, 2.0], [1.0])


def test_bounds_enclose_the_value_and_are_the_same_for_the_same_seed() -> None:
    baseline, other = [1.0, 1.2, 0.9, 1.1, 1.3, 0.8], [1.5, 1.1, 1.3, 1.0, 1.9, 1.2]
    estimate = paired_ratio(baseline, other, seed=3)
    assert estimate.low < estimate.value < estimate.high
    assert estimate == paired_ratio(baseline, other, seed=3)


def test_a_ratio_of_quantiles_is_over_all_rounds() -> None:
    baseline = [[10.0] * 50, [20.0] * 50]
    other = [[5.0] * 50, [10.0] * 50]
    assert quantile_ratio(baseline, other, 0.99).value == pytest.approx(0.5)
    assert quantile_ratio([[1.0, 1.0], [100.0]], [[1.0, 1.0], [1.0]], 1.0).value == pytest.approx(0.01)
