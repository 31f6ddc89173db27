"""The interface of a measurement: what it is given, and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chiasm.bench.client import Client
from chiasm.bench.goodput_options import GoodputOptions
from chiasm.bench.soak_options import SoakOptions
from chiasm.bench.statistics import Estimate, median, paired_ratio
from chiasm.launch.fork_server import ForkServer

SERVED_NAME = "bench"
"""The name under which every topology serves its model, whatever the checkpoint."""


@dataclass
class Bench:
    """What all measurements of a run share."""

    model: str
    """A checkpoint's folder, the name of a shipped one, or a hub name."""
    scratch: Path
    """A folder for synthetic checkpoints, which is removed after the run."""
    client: Client
    seed: int = 0
    quick: bool = False
    """Take few samples, to see that everything runs rather than how fast."""
    repeat: int | None = None
    """Number of samples, in place of each measurement's own."""
    goodput: GoodputOptions = field(default_factory=GoodputOptions)
    soak: SoakOptions = field(default_factory=SoakOptions)
    forks: ForkServer = field(default_factory=ForkServer)
    """What instances of all measurements are forked from."""
    keep: Callable[[Outcome], None] = field(default=lambda outcome: None)
    """Take note of what has been found so far, which is written and shown if the measurement ends early."""
    on_phase: Callable[[str, int | None], None] = field(default=lambda text, steps: None)
    advance: Callable[[], None] = field(default=lambda: None)
    """Move the progress bar by one step."""

    @property
    def model_name(self) -> str:
        """The model without the path that leads to it."""
        return self.model.rstrip("/").rpartition("/")[2]

    def phase(self, text: str, steps: int | None = None) -> None:
        """Show what is being done now; ``steps`` starts the progress bar again."""
        self.on_phase(text, steps)

    def samples(self, number: int, *, quick: int) -> int:
        """Return how many samples to take of a measurement that takes ``number``, or ``quick`` in a quick run."""
        if self.repeat is not None:
            return self.repeat
        return quick if self.quick else number


# ---- the result --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """One number of a measurement."""

    name: str
    value: float
    unit: str = ""
    """``ms``, ``MB``, ``x`` for a ratio, or empty for a count."""
    at_most: float | None = None
    """The target, in the same unit."""
    low: float | None = None
    high: float | None = None
    """The bounds of the value in 95 of 100 resamplings."""
    at_least: float | None = None
    """The target of a figure for which larger is better; at most one of the two targets is set."""

    @classmethod
    def of(
        cls, name: str, estimate: Estimate, unit: str, *, at_most: float | None = None, at_least: float | None = None
    ) -> Figure:
        """Return the figure of an estimate, with its bounds."""
        return cls(name, estimate.value, unit, at_most, estimate.low, estimate.high, at_least)

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None if there is no target."""
        if self.at_least is not None:
            return self.value >= self.at_least
        return None if self.at_most is None else self.value <= self.at_most


@dataclass(frozen=True)
class Series:
    """Samples of one thing, in the unit of its panel."""

    label: str
    values: Sequence[float]
    at_most: float | None = None
    """The target of their median, or of their 99th percentile in a panel that shows a tail."""


@dataclass(frozen=True)
class Panel:
    """One part of the plot."""

    title: str
    unit: str
    series: Sequence[Series]
    tail: bool = False
    """Draw the share of samples that are larger than each value, instead of every sample."""
    logarithmic: bool = False


@dataclass(frozen=True)
class Curve:
    """Measured points of one thing, and the line that was fitted to them, as pairs of x and y."""

    label: str
    points: Sequence[tuple[float, float]]
    line: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curves:
    """A narrow part of the plot: shares of 0 to 1, or anything else, over something that is drawn on a logarithmic scale."""

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    target: float | None = None
    """The share that is marked by a line; None if the curves aren't shares, so that both scales are logarithmic."""


@dataclass(frozen=True)
class TimeLines:
    """One part of the plot: what was read again and again, as lines over time. Only the ``line`` of each curve is drawn."""

    title: str
    x_label: str
    unit: str
    curves: Sequence[Curve]


@dataclass
class Outcome:
    """Everything that one measurement found."""

    figures: list[Figure] = field(default_factory=list)
    panels: list[Panel | Curves | TimeLines] = field(default_factory=list)
    trials: list[dict[str, Any]] = field(default_factory=list)
    """What was tried, for results.json."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """What the measurement set itself, in JSON's types, for results.json."""
    notes: list[str] = field(default_factory=list)
    """Sentences for the reader: what was sent, what differed, why something was left out."""
    wrong: bool = False
    """Whether answers differ that must be equal. That is a fault, whatever the machine."""
    seconds: float = 0.0
    """How long the measurement took."""

    @property
    def met(self) -> bool | None:
        """Whether all targets are met; None if there are none."""
        judged = [figure.met for figure in self.figures if figure.met is not None]
        return all(judged) if judged else None

    def compare(
        self, name: str, samples: Mapping[str, Sequence[float]], *, title: str, seed: int, at_most: float | None = None
    ) -> None:
        """Add the ratio of the second to the first of two series, the median of each, and a panel called ``title``.

        ``samples`` are milliseconds by label, taken in pairs. ``at_most`` is the target of the ratio.
        """
        (baseline, before), (other, after) = samples.items()
        ratio = paired_ratio(before, after, seed=seed)
        self.figures.append(Figure.of(f"{name}: {other} / {baseline}", ratio, "x", at_most=at_most))
        medians = [Figure(f"{name}: {label}, median", median(taken), "ms") for label, taken in samples.items()]
        self.figures += [figure for figure in medians if figure not in self.figures]  # a series may be compared twice
        limit = None if at_most is None else at_most * median(before)
        self.panels.append(Panel(title, "ms", [Series(baseline, before), Series(other, after, limit)]))


class Measurement(ABC):
    """One question, and how it is answered."""

    name: str
    """What the command line calls it."""
    purpose: str
    """What is measured, in one line."""
    target: str
    """The target in words, in one line."""
    only_by_name = False
    """Whether it takes so long that it runs only if it is asked for by its name."""

    @abstractmethod
    async def run(self, bench: Bench) -> Outcome:
        """Start what is needed, measure, and end it all, also when cancelled. Raises ChiasmError."""
