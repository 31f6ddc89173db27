"""How many requests per second are answered in time: judges requests, searches the rate, and compares. Nothing here sends.

A rate is tried by *trials*: so many requests, sent in an open loop. The *goodput* is the highest rate at which 90 % of the
requests meet their limits. Whether a trial of fifty requests reaches 90 % is mostly chance, so the rate isn't bisected by
passed and failed trials. Instead, the share that met its limits is taken as a logistic function of the logarithm of the rate,
which is fitted to all trials, each weighted by its requests, and is read off at 90 %. The next trial is made where the fit so
far puts that rate, since it says most there. That is how thresholds of perception are estimated from yes and no answers
(QUEST: Watson and Pelli, Perception & Psychophysics 33, 1983, with a fitted slope as in Kontsevich and Tyler, Vision Research
39, 1999).
"""

from __future__ import annotations

import enum
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import numpy.typing as npt

from chiasm.bench.statistics import Estimate, bootstrap, quantile
from chiasm.launch import DeploymentConfig
from chiasm.options import Option

AGGREGATED, REPLICAS, SPLIT, COLOCATED = STANDARD = ("aggregated", "replicas", "split", "colocated")
"""The deployments that are always compared; see ``arms``."""
TARGET = 0.9
"""Share of the requests that must meet both limits."""


@dataclass(frozen=True)
class GoodputOptions:
    """What a person chooses for ``goodput`` and ``trace``."""

    arms: Annotated[
        tuple[str, ...],
        Option(
            "Deployments to compare: aggregated, replicas, split, colocated, and the names given with --arm.",
            metavar="ARMS",
            separator=",",
            unset="all",
        ),
    ] = ()
    mixes: Annotated[
        tuple[str, ...],
        Option(
            "Mixes of requests: text, mixed, images, heavy, repeats, burst.",
            metavar="MIXES",
            separator=",",
            unset="all; with --quick, mixed and heavy",
        ),
    ] = ()
    ttft_slo_factor: Annotated[
        float, Option("Limit of the time to first token, as a multiple of that on an idle machine.", min=1)
    ] = 5.0
    tpot_slo_factor: Annotated[
        float, Option("Limit of the time per output token, as a multiple of that on an idle machine.", min=1)
    ] = 3.0
    ttft_slo: Annotated[
        float | None,
        Option(
            "Limit of the time to first token of every request.", metavar="SECONDS", min=0.001, unset="by the factor"
        ),
    ] = None
    tpot_slo: Annotated[
        float | None,
        Option(
            "Limit of the time per output token of every request.", metavar="SECONDS", min=0.001, unset="by the factor"
        ),
    ] = None
    model: str | None = None
    """The checkpoint that a person asked for; None: a synthetic one."""
    more_arms: Mapping[str, DeploymentConfig] = field(default_factory=dict)
    """Other deployments by name. Their model is replaced by the one that is measured."""


@dataclass(frozen=True)
class Limits:
    """What a request of one size class must meet to count as good."""

    ttft_seconds: float
    tpot_seconds: float


class Verdict(enum.StrEnum):
    """What became of a request."""

    GOOD = "good"
    LATE = "late"
    """The first token came too late, or the request was given up because it was far too late."""
    SLOW = "slow"
    """The first token came in time, the others took too long."""
    REFUSED = "refused"
    """Answered with 429 or 503."""
    FAILED = "failed"


@dataclass(frozen=True)
class Served:
    """One request of a trial."""

    size_class: str
    verdict: Verdict
    ttft_seconds: float | None = None
    """From when the request was due; None if no token came."""
    tpot_seconds: float | None = None
    """Mean time per token after the first; None for one token, and if the answer didn't end."""


def judge(limits: Limits, ttft_seconds: float, tpot_seconds: float | None) -> Verdict:
    """Return the verdict on a complete answer."""
    if ttft_seconds > limits.ttft_seconds:
        return Verdict.LATE
    if tpot_seconds is not None and tpot_seconds > limits.tpot_seconds:
        return Verdict.SLOW
    return Verdict.GOOD


@dataclass(frozen=True)
class Trial:
    """The requests of one seed at one rate."""

    rate: float
    """Requests per second."""
    seed: int
    served: Sequence[Served]

    @property
    def good(self) -> int:
        """Number of requests that met both limits."""
        return self.count(Verdict.GOOD)

    @property
    def attained(self) -> float:
        """Share of the requests that met both limits."""
        return self.good / len(self.served)

    @property
    def passed(self) -> bool:
        return self.attained >= TARGET

    def count(self, verdict: Verdict) -> int:
        return sum(one.verdict is verdict for one in self.served)

    def summary(self) -> dict[str, object]:
        """Return what results.json keeps of the trial; times in seconds, at the 50th, 90th and 99th percentile."""
        ttfts = [one.ttft_seconds for one in self.served if one.ttft_seconds is not None]
        tpots = [one.tpot_seconds for one in self.served if one.tpot_seconds is not None]
        return {
            "rate": self.rate,
            "seed": self.seed,
            "requests": len(self.served),
            "attained": self.attained,
            **{str(verdict): self.count(verdict) for verdict in Verdict},
            "ttft_seconds": _quantiles(ttfts),
            "tpot_seconds": _quantiles(tpots),
        }


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    return {f"p{share:.0f}": quantile(values, share / 100) for share in (50, 90, 99)} if values else {}


# ---- the fit -----------------------------------------------------------------------------------------------------------

Rates = npt.NDArray[np.float64]

_USUAL_SLOPE = 4.0
_SLOPE_SPREAD = 0.8
"""Standard deviation of the logarithm of the slope, before anything is measured."""
_SLOPES = tuple(0.5 * 1.25**step for step in range(18))
_RATE_STEPS = 400
_BEYOND = 3.0
"""The fit looks for the rate up to this factor beyond those tried."""
_DISPERSION = 3.0
"""Requests that wait behind the same others are good or bad together: a trial says as much as a third of its requests."""


@dataclass(frozen=True)
class Curve:
    """The share of good requests as a logistic function of the logarithm of the rate."""

    goodput: float
    """The rate at which the share is ``TARGET``."""
    slope: float

    def attained(self, rate: float) -> float:
        """Return the share at a rate."""
        logit = math.log(TARGET / (1 - TARGET)) + self.slope * math.log(self.goodput / rate)
        return 1 / (1 + math.exp(min(700.0, -logit)))


def fit(trials: Sequence[Trial]) -> Curve:
    """Return the curve that is likeliest after all trials. Raises ValueError without trials."""
    rates, slopes = _rates(trials), np.array(_SLOPES)
    strangeness = (np.log(slopes / _USUAL_SLOPE) / _SLOPE_SPREAD) ** 2 / 2
    scores = _log_likelihood(rates[:, None], slopes[None, :], trials) - strangeness
    rate, slope = np.unravel_index(int(scores.argmax()), scores.shape)
    return Curve(float(rates[rate]), float(slopes[slope]))


def _rates(trials: Sequence[Trial]) -> Rates:
    """Return the rates that are considered, in ascending order."""
    if not trials:
        raise ValueError("there are no trials to fit")
    low = min(trial.rate for trial in trials) / _BEYOND
    high = max(trial.rate for trial in trials) * _BEYOND
    return np.geomspace(low, high, _RATE_STEPS)


def _log_likelihood(goodputs: Rates, slopes: Rates, trials: Sequence[Trial]) -> Rates:
    """Return the logarithm of the likelihood of each curve, in the shape that goodputs and slopes have together."""
    total = np.zeros(np.broadcast_shapes(goodputs.shape, slopes.shape))
    for trial in trials:
        logit = math.log(TARGET / (1 - TARGET)) + slopes * np.log(goodputs / trial.rate)
        good, number = trial.good, len(trial.served)
        total -= good * np.logaddexp(0.0, -logit) + (number - good) * np.logaddexp(0.0, logit)
    return total / _DISPERSION


# ---- the search --------------------------------------------------------------------------------------------------------

_STEP = 2.0
_NEAR = 1.5
"""The next rate is at most by this factor outside of those tried."""


class RateSearch:
    """Chooses the rates at which one deployment is tried with one kind of traffic."""

    def __init__(self, first_rate: float, lowest_rate: float) -> None:
        """``lowest_rate``: if a trial there fails, no rate will do."""
        self.trials: list[Trial] = []
        self._first = first_rate
        self._lowest = lowest_rate

    @property
    def bracketed(self) -> bool:
        """Whether one trial has passed and another has failed."""
        return len({trial.passed for trial in self.trials}) == 2

    @property
    def hopeless(self) -> bool:
        """Whether every trial has failed, down to the lowest rate."""
        return bool(self.trials) and not any(one.passed for one in self.trials) and self._tried()[0] <= self._lowest

    def next_rate(self) -> float:
        """Return the rate to try next: twice or half of those tried until bracketed, then where the fit expects the goodput."""
        if not self.trials:
            return self._first
        low, high = self._tried()
        if not self.bracketed:
            return _STEP * high if self.trials[0].passed else max(self._lowest, low / _STEP)
        return min(high * _NEAR, max(low / _NEAR, self._lowest, fit(self.trials).goodput))

    def add(self, trial: Trial) -> None:
        self.trials.append(trial)

    def _tried(self) -> tuple[float, float]:
        rates = [trial.rate for trial in self.trials]
        return min(rates), max(rates)


@dataclass(frozen=True)
class Goodput:
    """What the trials of one deployment with one kind of traffic say."""

    trials: Sequence[Trial]
    seeds: Sequence[int]
    """Those that all deployments were tried with; other trials only looked for the rate."""

    @functools.cached_property
    def curve(self) -> Curve | None:
        """The curve of all trials; None if no rate will do."""
        return fit(self.trials) if any(trial.passed for trial in self.trials) else None

    @property
    def rate(self) -> float:
        """Requests per second; 0 if no rate will do."""
        return 0.0 if self.curve is None else self.curve.goodput

    def rate_of(self, seeds: Sequence[int]) -> float:
        """Return the requests per second by the trials of some seeds, which may occur several times."""
        other = [trial for trial in self.trials if trial.seed not in self.seeds]
        chosen = [trial for seed in seeds for trial in self.trials if trial.seed == seed]
        return fit([*other, *chosen]).goodput


def ratio(baseline: Goodput, other: Goodput, *, seed: int) -> Estimate | None:
    """Estimate the ratio of two goodputs; None if the baseline has none.

    The seeds are resampled, the same for both, since the requests of one seed wait for each other.
    """
    if baseline.curve is None:
        return None
    if other.curve is None:
        return Estimate(0.0, 0.0, 0.0)

    @functools.cache
    def of(seeds: tuple[int, ...]) -> float:
        return other.rate_of(seeds) / baseline.rate_of(seeds)

    return bootstrap(list(baseline.seeds), lambda seeds: of(tuple(sorted(seeds))), seed)
