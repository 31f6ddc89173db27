"""How many requests per second are answered in time: judges requests, searches the rate, and compares. Nothing here sends.

A rate is tried by *trials*: so many requests, sent in an open loop. The *goodput* is the highest rate at which 90 % of the
requests meet their limits. Whether a trial of fifty requests reaches 90 % is mostly chance, so the rate isn't bisected by
passed and failed trials. Instead, the share that met its limits is taken as a logistic function of the logarithm of the rate,
which is fitted to all trials, each weighted by its requests, and is read off at 90 %. The next trials are made where the fit so
far puts that rate, since they say most there. That is how thresholds of perception are estimated from yes and no answers
(QUEST: Watson and Pelli, Perception & Psychophysics 33, 1983, with a fitted slope as in Kontsevich and Tyler, Vision Research
39, 1999).
"""

from __future__ import annotations

import enum
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from chiasm.bench.statistics import Estimate, quantile, resamples, with_bounds

TARGET = 0.9
"""Share of the requests that must meet both limits."""


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
    process_seconds: Mapping[str, float] = field(default_factory=dict)
    """CPU time of each process of the deployment, by name; empty if it isn't known."""

    @property
    def cpu_seconds(self) -> float | None:
        """CPU time of all processes together; None if it isn't known."""
        return sum(self.process_seconds.values()) if self.process_seconds else None

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

    def ttft_seconds(self, share: float) -> float | None:
        """Return the time in which this share of the requests got the first token; None if that many got none at all."""
        times = [math.inf if one.ttft_seconds is None else one.ttft_seconds for one in self.served]
        found = sorted(times)[math.ceil(share * len(times)) - 1]
        return None if math.isinf(found) else found

    def tpot_seconds(self, share: float) -> float | None:
        """Return the time per token that this share of the answers kept to; None if none ended."""
        times = [one.tpot_seconds for one in self.served if one.tpot_seconds is not None]
        return quantile(times, share) if times else None

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
            "cpu_seconds": self.cpu_seconds,
            "process_seconds": dict(self.process_seconds),
        }


def in_time(trials: Sequence[Trial]) -> float:
    """Return the share of the requests of all trials that met both limits."""
    return sum(trial.good for trial in trials) / sum(len(trial.served) for trial in trials)


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


class Trials:
    """What several deployments did with the same traffic, and the curves that are likeliest after it.

    The curves of all deployments have one slope. Deployments are compared by resampling rounds, in each of which all of them
    got the same requests at the same rate: what makes one round hard makes it hard for all.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.of: dict[str, list[Trial]] = {name: [] for name in names}
        """Trials by deployment."""
        self.unable: set[str] = set()
        """Deployments that miss the limits even with one request at a time, so that no rate is tried."""
        self._resampled: dict[int, list[dict[str, float]]] = {}

    def add(self, name: str, trial: Trial) -> None:
        self.of[name].append(trial)
        self._resampled.clear()
        self.__dict__.pop("curves", None)
        self.__dict__.pop("_table", None)

    def is_tried(self, name: str) -> bool:
        """Tell whether it is known what a deployment does, be it that it answers nothing in time."""
        return bool(self.of[name]) or name in self.unable

    @property
    def rounds(self) -> int:
        """How many different patterns of requests were tried."""
        return len({trial.seed for several in self.of.values() for trial in several})

    @functools.cached_property
    def curves(self) -> dict[str, Curve | None]:
        """By deployment; None if no trial of a deployment passed, or there was none."""
        return self._fit(np.ones(self.rounds)) if self.rounds else dict.fromkeys(self.of)

    def rate(self, name: str) -> float:
        """Return the goodput of a deployment in requests per second; 0 if no rate will do."""
        curve = self.curves[name]
        return 0.0 if curve is None else curve.goodput

    def cpu_seconds_per_request(self, name: str) -> float | None:
        """Return the CPU time per request in the trials that passed; None if none did, or it isn't known for all of them.

        Where many requests are given up, it would be less for less work.
        """
        passed = [trial for trial in self.of[name] if trial.passed]
        known = [trial.cpu_seconds for trial in passed if trial.cpu_seconds is not None]
        if not passed or len(known) < len(passed):
            return None
        return sum(known) / sum(len(trial.served) for trial in passed)

    def ratio(self, baseline: str, other: str, *, seed: int) -> Estimate | None:
        """Estimate the ratio of two goodputs; None if the baseline has none."""
        if not self.rate(baseline):
            return None
        if not self.rate(other):
            return Estimate(0.0, 0.0, 0.0)
        resampled = [rates[other] / rates[baseline] for rates in self.resampled(seed)]
        return with_bounds(self.rate(other) / self.rate(baseline), resampled)

    def resampled(self, seed: int) -> list[dict[str, float]]:
        """Return the goodputs by deployment for each resampling of the rounds; 0 if no rate will do."""
        if seed not in self._resampled and self.rounds:
            seeds = self._table.seeds
            fits = (self._fit(np.array([chosen.count(one) for one in seeds])) for chosen in resamples(seeds, seed))
            self._resampled[seed] = [
                {name: 0.0 if curve is None else curve.goodput for name, curve in curves.items()} for curves in fits
            ]
        return self._resampled.get(seed, [])

    def _fit(self, weights: npt.NDArray[Any]) -> dict[str, Curve | None]:
        """Return the likeliest curves if the rounds count by ``weights``."""
        table = self._table
        scores = {name: np.tensordot(weights, one, 1) for name, one in table.log_likelihoods.items()}
        by_slope = sum(score.max(axis=1) for score in scores.values()) - table.strangeness
        slope = int(np.argmax(by_slope))
        found: dict[str, Curve | None] = dict.fromkeys(self.of)
        for name, score in scores.items():
            found[name] = Curve(float(table.rates[int(score[slope].argmax())]), _SLOPES[slope])
        return found

    @functools.cached_property
    def _table(self) -> _Table:
        return _Table(self.of)


class _Table:
    """The logarithm of the likelihood of each round, for each deployment that has passed a trial, slope and goodput."""

    def __init__(self, trials: Mapping[str, Sequence[Trial]]) -> None:
        every = [trial for several in trials.values() for trial in several]
        low, high = min(trial.rate for trial in every), max(trial.rate for trial in every)
        self.rates = np.geomspace(low / _BEYOND, high * _BEYOND, _RATE_STEPS)
        self.seeds = sorted({trial.seed for trial in every})
        slopes = np.array(_SLOPES)
        self.strangeness = (np.log(slopes / _USUAL_SLOPE) / _SLOPE_SPREAD) ** 2 / 2
        self.log_likelihoods: dict[str, Rates] = {}
        """``[rounds, slopes, rates]``."""
        for name, several in trials.items():
            if any(trial.passed for trial in several):
                rounds = np.zeros((len(self.seeds), len(slopes), _RATE_STEPS))
                for trial in several:
                    rounds[self.seeds.index(trial.seed)] += _log_likelihood(self.rates, slopes[:, None], trial)
                self.log_likelihoods[name] = rounds


def _log_likelihood(goodputs: Rates, slopes: Rates, trial: Trial) -> Rates:
    """Return the logarithm of the likelihood of each curve, in the shape that goodputs and slopes have together."""
    logit = math.log(TARGET / (1 - TARGET)) + slopes * np.log(goodputs / trial.rate)
    bad = len(trial.served) - trial.good
    total: Rates = -(trial.good * np.logaddexp(0.0, -logit) + bad * np.logaddexp(0.0, logit))
    return total / _DISPERSION


# ---- the search --------------------------------------------------------------------------------------------------------

_STEP = 1.6
_CLEAR = 1.3
"""A deployment is not tried at rates beyond this factor from one that it clearly failed or passed."""
_FAILED, _PASSED = 0.6, 0.97
"""Shares of good requests by which a trial clearly failed or passed."""


class RateSearch:
    """Chooses the rates at which deployments are tried, all at the same ones, and where each of them needs no trial."""

    def __init__(self, names: Sequence[str], first_rate: float, lowest_rate: float) -> None:
        """``lowest_rate``: what fails there has no goodput."""
        self.trials = Trials(names)
        self._first = first_rate
        self._lowest = lowest_rate
        self._turn = 0

    @property
    def over(self) -> bool:
        """Whether no rate will do for any deployment."""
        return not any(self._is_open(name) for name in self.trials.of)

    def next_rate(self) -> float:
        """Return the rate of the next round.

        It rises while a deployment has passed everywhere, falls while one has passed nowhere, and is then where the curves so
        far put the goodput of each deployment in turn.
        """
        tried = {name: several for name, several in self.trials.of.items() if several and self._is_open(name)}
        if not tried:
            return self._first
        rates = [trial.rate for several in self.trials.of.values() for trial in several]
        if any(all(trial.passed for trial in several) for several in tried.values()):
            return _STEP * max(rates)
        if any(not any(trial.passed for trial in several) for several in tried.values()):
            return max(self._lowest, min(rates) / _STEP)
        names = sorted(tried, key=self.trials.rate)
        self._turn += 1
        wanted = self.trials.rate(names[self._turn % len(names)])
        return min(max(rates) * _STEP, max(self._lowest, min(rates) / _STEP, wanted))

    def names_at(self, rate: float) -> list[str]:
        """Return the deployments for which a trial at this rate says something."""
        return [name for name in self.trials.of if self._is_open(name) and not self._is_clear(name, rate)]

    def _is_open(self, name: str) -> bool:
        """Tell whether there may be a rate that will do."""
        several = self.trials.of[name]
        return not several or any(one.passed for one in several) or min(one.rate for one in several) > self._lowest

    def _is_clear(self, name: str, rate: float) -> bool:
        return any(
            (trial.attained <= _FAILED and rate >= _CLEAR * trial.rate)
            or (trial.attained >= _PASSED and rate <= trial.rate / _CLEAR)
            for trial in self.trials.of[name]
        )
