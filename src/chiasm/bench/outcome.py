"""What a measurement found: figures with their targets, and the samples behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from chiasm.bench.statistics import Estimate


@dataclass(frozen=True)
class Figure:
    """One number of a measurement."""

    name: str
    value: float
    unit: str = ""
    """``ms``, ``MB``, ``x`` for a ratio, or nothing for a count."""
    at_most: float | None = None
    """The target, in the same unit; None where there is none."""
    low: float | None = None
    high: float | None = None
    """Between which the value lies in 95 of 100 resamplings."""
    at_least: float | None = None
    """The target of a figure that is to be large, in place of ``at_most``."""

    @classmethod
    def of(
        cls, name: str, estimate: Estimate, unit: str, *, at_most: float | None = None, at_least: float | None = None
    ) -> Figure:
        """The figure of an estimate, with its bounds."""
        return cls(name, estimate.value, unit, at_most, estimate.low, estimate.high, at_least)

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None where there is none."""
        if self.at_least is not None:
            return self.value >= self.at_least
        return None if self.at_most is None else self.value <= self.at_most


@dataclass(frozen=True)
class Series:
    """Samples of one thing, in the unit of its panel."""

    label: str
    values: Sequence[float]
    at_most: float | None = None
    """The target for what the plot marks of it: the median, or in a tail the 99th percentile."""


@dataclass(frozen=True)
class Panel:
    """One part of the plot."""

    title: str
    unit: str
    series: Sequence[Series]
    tail: bool = False
    """Whether to draw which share of the samples is larger than a value, rather than each sample."""
    logarithmic: bool = False


@dataclass
class Outcome:
    """All of one measurement."""

    figures: list[Figure] = field(default_factory=list)
    panels: list[Panel] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Sentences for the reader: what was sent, what differed, why something was left out."""
    wrong: bool = False
    """Answers differ that must not: a fault and no matter of speed."""
    seconds: float = 0.0
    """How long it took."""

    @property
    def met(self) -> bool | None:
        """Whether all targets are met; None where there are none."""
        judged = [figure.met for figure in self.figures if figure.met is not None]
        return all(judged) if judged else None
