"""What the plot shows of each kind of traffic: shares in time, and times, over the rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from chiasm.bench.goodput import TARGET, Trial, Trials
from chiasm.bench.measurement import Curve, Curves
from chiasm.bench.statistics import median

_RATE = "requests per second"
_LINE_STEPS = 40
_NEAR = 1.25
"""Trials whose rates differ by less than this factor are one point of a line."""


def panels_of(traffic: str, arms: Trials) -> list[Curves]:
    """Return the share in time with the fitted curves, and the 90th percentiles of both times with a line of medians."""
    return [
        _shares(traffic, arms),
        _times(traffic, arms, "first token, ms", lambda trial: trial.ttft_seconds(TARGET)),
        _times(traffic, arms, "time per token, ms", lambda trial: trial.tpot_seconds(TARGET)),
    ]


def _shares(traffic: str, arms: Trials) -> Curves:
    curves = []
    for name, trials in arms.of.items():
        points = [(trial.rate, trial.attained) for trial in trials]
        line: list[tuple[float, float]] = []
        if (curve := arms.curves[name]) is not None:
            low, high = min(points)[0], max(points)[0]
            rates = [low * (high / low) ** (step / _LINE_STEPS) for step in range(_LINE_STEPS + 1)]
            line = [(rate, curve.attained(rate)) for rate in rates]
        curves.append(Curve(f"{name} ({arms.rate(name):.2g}/s)", points, line))
    return Curves(f"goodput: {traffic}", _RATE, "share in time", curves, TARGET)


def _times(traffic: str, arms: Trials, label: str, seconds_of: Callable[[Trial], float | None]) -> Curves:
    curves = []
    for name, trials in arms.of.items():
        taken = [(trial.rate, seconds_of(trial)) for trial in trials]
        points = [(rate, 1000 * seconds) for rate, seconds in taken if seconds]  # no logarithm of 0
        curves.append(Curve(name, points, _medians(points)))
    return Curves(f"{traffic}: 90th percentile", _RATE, label, curves)


def _medians(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return a point for each group of points that are near each other."""
    groups: list[list[tuple[float, float]]] = []
    for point in sorted(points):
        if not groups or point[0] > _NEAR * groups[-1][0][0]:
            groups.append([])
        groups[-1].append(point)
    return [
        (math.exp(sum(math.log(rate) for rate, _ in group) / len(group)), median([value for _, value in group]))
        for group in groups
    ]
