"""How each candidate does: the share of requests in time at a rate, or the highest rate at which 90 % are in time.

Rates are searched and read off a fitted curve as ``chiasm bench goodput`` does, so that what it measures and what a plan
says can be compared.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from chiasm.bench.goodput import TARGET, Limits, RateSearch, Served, Trial, Verdict, judge
from chiasm.bench.statistics import quantile
from chiasm.bench.trace import Trace
from chiasm.bench.traffic import Arrival, Mix, Traffic, within
from chiasm.errors import ConfigurationError
from chiasm.plan.costs import CostModel, StepShape
from chiasm.plan.devices import Device, Gpu
from chiasm.plan.layouts import Candidate, Place
from chiasm.plan.outcome import Outcome, Result, tokens_of
from chiasm.plan.roofline import Roofline
from chiasm.plan.shapes import ModelShape
from chiasm.plan.sharing import Stage
from chiasm.plan.simulation import MAX_REQUESTS, Simulation

SEEDS = 3
"""Patterns of arrivals that are tried."""
_TRIALS = 12
"""Trials of one search."""
_RANGE = 256.0
"""A search goes down to this part of the rate that the devices could do at best."""
_BEYOND = 1.1
"""What limits a candidate is seen a little beyond its rate, where requests are late."""
_SLOWEST_SHARE = 0.9
_SPANS = 5.0
"""A trial of a mix lasts so many times the longest time to a first token, or its queues would not fill."""
_MOST_REQUESTS = 3000
"""Requests in one trial of a mix, unless a person asks for more."""
_OTHER_LIMIT = 0.2


@dataclass(frozen=True)
class WholeTrace:
    """All requests of a trace in each trial, where the benchmark takes a part of it."""

    trace: Trace

    @property
    def name(self) -> str:
        return self.trace.name

    def pattern(self, seed: int) -> list[Arrival]:
        first = self.trace.requests[0].time
        return [replace(one, time=(one.time - first) * self.trace.rate) for one in self.trace.requests]


@dataclass(frozen=True)
class Workload:
    """What is asked, and what has to be met."""

    traffic: Traffic
    limits: Mapping[str, Limits]
    """By size class."""
    seed: int = 0
    seeds: int = SEEDS

    rate: float | None = None
    """Requests per second; None to search for the highest."""
    requests: int | None = None
    """Requests in a trial of a mix; None: enough for the devices."""
    longest_seconds: float = math.inf
    """A trial ends with the last request that arrives until then, but has at least 8 requests."""


@dataclass(frozen=True)
class Finding:
    """How one candidate does."""

    candidate: Candidate
    rate: float
    """Requests per second: as asked, or the highest at which ``TARGET`` of them are in time; 0 if there is none."""
    attained: float
    """Share in time at that rate."""
    ttft_seconds: float
    """90th percentile at that rate, of answers that began."""
    tpot_seconds: float
    busy: Mapping[Stage, float]
    """Share of the devices' time that each stage uses."""
    limited_by: str
    curve: Sequence[tuple[float, float]] = ()
    """Rates that were tried, and the shares in time."""

    @property
    def device_seconds(self) -> float:
        """Device-seconds for 1000 requests in time; 0 if there are none."""
        useful = self.rate * self.attained
        return 1000 * self.candidate.num_devices / useful if useful else 0.0


class Planner:
    """Simulates candidates under one workload."""

    def __init__(
        self,
        shape: ModelShape,
        workload: Workload,
        cost_of: Callable[[Place], CostModel],
        places: Sequence[Place],
    ) -> None:
        """``places`` are all devices. Raises ConfigurationError if the workload cannot be simulated."""
        self._shape = shape
        self._workload = workload
        self._cost_of = cost_of
        self._check_requests(workload.requests or 0)
        self._best_rate = self._rate_at_best(places, workload.traffic.pattern(workload.seed))
        traffic = self._enough(workload)
        self._patterns = [traffic.pattern(workload.seed + index) for index in range(workload.seeds)]
        self.longest_tokens = max(tokens_of(one.shape, shape) for pattern in self._patterns for one in pattern)

    def _enough(self, workload: Workload) -> Traffic:
        """Return the traffic with enough requests in a trial; a trace has those that it has."""
        traffic = workload.traffic
        if not isinstance(traffic, Mix):
            return traffic
        requests = workload.requests
        if requests is None:
            longest = max(workload.limits[one.shape.size_class].ttft_seconds for one in traffic.pattern(workload.seed))
            wanted = _SPANS * longest * (workload.rate or self._best_rate)
            requests = int(min(_MOST_REQUESTS, max(traffic.requests, wanted)))
        return replace(traffic, requests=requests)

    def at_rate(self, candidate: Candidate, rate: float) -> Finding:
        """Return how a candidate does at a rate."""
        results = [self.simulate(candidate, rate, index) for index in range(len(self._patterns))]
        served = [self._served(outcome) for result in results for outcome in result.outcomes]
        good = sum(one.verdict is Verdict.GOOD for one in served) / len(served)
        return self._finding(candidate, rate, good, results, served, self._limited_by(results))

    def highest_rate(self, candidate: Candidate) -> Finding:
        """Return the highest rate at which ``TARGET`` of the requests are in time."""
        name = candidate.name
        search = RateSearch([name], self._best_rate / 2, self._best_rate / _RANGE)
        for number in range(_TRIALS):
            if search.over:
                break
            seed = number % len(self._patterns)
            rate = search.next_rate()
            arrivals = within(self._patterns[seed], rate, self._workload.longest_seconds)
            search.trials.add(name, self.trial(candidate, arrivals, rate, seed))
        tried, highest = search.trials.of[name], search.trials.rate(name)
        curve = sorted((trial.rate, trial.attained) for trial in tried)
        if not highest:
            lowest = self.at_rate(candidate, tried[-1].rate)
            return replace(lowest, rate=0.0, attained=lowest.attained, curve=curve)
        there = self.at_rate(candidate, highest)
        beyond = [self.simulate(candidate, _BEYOND * highest, index) for index in range(len(self._patterns))]
        return replace(there, attained=TARGET, limited_by=self._limited_by(beyond), curve=curve)

    def trial(self, candidate: Candidate, arrivals: Sequence[Arrival], rate: float, seed: int) -> Trial:
        """Return what becomes of requests that arrive at a rate; ``seed`` is theirs."""
        outcomes = self._simulate(candidate, arrivals, rate).outcomes
        return Trial(rate, seed, [self._served(outcome) for outcome in outcomes])

    def simulate(self, candidate: Candidate, rate: float, pattern: int) -> Result:
        """Return what happens with one of the workload's patterns."""
        arrivals = within(self._patterns[pattern], rate, self._workload.longest_seconds)
        return self._simulate(candidate, arrivals, rate)

    def _simulate(self, candidate: Candidate, arrivals: Sequence[Arrival], rate: float) -> Result:
        costs = [self._cost_of(place) for place in candidate.places]
        return Simulation(candidate, self._shape, costs, arrivals, limits=self._workload.limits).run(rate)

    def _rate_at_best(self, places: Sequence[Place], pattern: Sequence[Arrival]) -> float:
        """Return a rate that no deployment exceeds by much: all devices always busy. Raises ConfigurationError."""
        if not pattern:
            raise ConfigurationError(f"{self._workload.traffic.name} has no requests.")
        self._check_requests(len(pattern))
        total = 0.0
        for place in places:
            cost = self._cost_of(place)
            total += place.cores * len(pattern) / sum(self._seconds(cost, arrival) for arrival in pattern)
        return total

    def _check_requests(self, number: int) -> None:
        if number > MAX_REQUESTS:
            raise ConfigurationError(
                f"{self._workload.traffic.name} has {number} requests, and a simulation takes at most {MAX_REQUESTS}; give "
                "fewer of them."
            )

    def _seconds(self, cost: CostModel, arrival: Arrival) -> float:
        """Return what one request costs, on one core or GPU, when many share each step."""
        asked = arrival.shape
        encode = sum(
            cost.prepare_seconds(height, width) + cost.encode_seconds(height, width, 1)
            for width, height in asked.images
        )
        prompt = tokens_of(asked, self._shape) - asked.answer_tokens
        batch = 16
        decode = asked.answer_tokens * cost.step_seconds(StepShape(batch, 0, batch * prompt), 1) / batch
        return encode + cost.step_seconds(StepShape(prompt, prompt**2 / 2), 1) + decode

    # ---- judging ---------------------------------------------------------------------------------------------------------

    def _served(self, outcome: Outcome) -> Served:
        size_class = outcome.shape.size_class
        if outcome.refused:
            return Served(size_class, Verdict.REFUSED)
        if outcome.first_token is None:
            return Served(size_class, Verdict.LATE)
        verdict = judge(self._workload.limits[size_class], outcome.first_token, outcome.tpot_seconds)
        if outcome.end is None and verdict is Verdict.GOOD:
            verdict = Verdict.SLOW
        return Served(size_class, verdict, outcome.first_token, outcome.tpot_seconds)

    def _finding(
        self,
        candidate: Candidate,
        rate: float,
        attained: float,
        results: Sequence[Result],
        served: Sequence[Served],
        limited_by: str,
    ) -> Finding:
        ttfts = [one.ttft_seconds for one in served if one.ttft_seconds is not None]
        tpots = [one.tpot_seconds for one in served if one.tpot_seconds is not None]
        busy = {stage: sum(result.busy[stage] for result in results) / len(results) for stage in Stage}
        return Finding(
            candidate,
            rate,
            attained,
            quantile(ttfts, TARGET) if ttfts else 0.0,
            quantile(tpots, TARGET) if tpots else 0.0,
            busy,
            limited_by,
        )

    def _limited_by(self, results: Sequence[Result]) -> str:
        """Return what the requests that are late wait for most; if none is, the slowest tenth of them."""
        outcomes = [outcome for result in results for outcome in result.outcomes]
        late = [outcome for outcome in outcomes if self._served(outcome).verdict is not Verdict.GOOD]
        if not late:
            firsts = [outcome.first_token or 0.0 for outcome in outcomes]
            limit = quantile(firsts, _SLOWEST_SHARE)
            late = [outcome for outcome in outcomes if (outcome.first_token or 0.0) >= limit]
        counted = Counter(self._reason(outcome) for outcome in late)
        (first, number), *others = counted.most_common(2)
        if others and others[0][1] > _OTHER_LIMIT * (number + others[0][1]):
            return f"{first}, {others[0][0]}"
        return first

    def _reason(self, outcome: Outcome) -> str:
        """Return the part of the deployment in which one request has spent most of its time."""
        limits = self._workload.limits[outcome.shape.size_class]
        if outcome.refused:
            return "memory"
        in_time = outcome.first_token is not None and outcome.first_token <= limits.ttft_seconds
        if in_time and (outcome.end is None or (outcome.tpot_seconds or 0.0) > limits.tpot_seconds):
            return "decode"
        if outcome.first_token is None and outcome.shape.images and not outcome.embedded:
            return "encoder"
        first = limits.ttft_seconds if outcome.first_token is None else outcome.first_token
        parts = {
            "encoder": max(0.0, outcome.embedded - outcome.moved),
            "transfer": outcome.moved,
            "prefill": first - outcome.embedded,
        }
        return max(parts, key=parts.__getitem__)


def computed_costs(shape: ModelShape) -> Callable[[Place], CostModel]:
    """Return what gives each GPU its costs."""
    made: dict[Device, CostModel] = {}

    def cost_of(place: Place) -> CostModel:
        assert isinstance(place.device, Gpu)
        if place.device not in made:
            made[place.device] = Roofline(place.device, shape)
        return made[place.device]

    return cost_of


def best(findings: Sequence[Finding], *, by_rate: bool) -> Finding:
    """Return the recommendation: the highest rate, or the most requests in time, then the earliest first tokens.

    Candidates within a hundredth of each other count as equal.
    """
    if by_rate:
        top = max(one.rate for one in findings)
        alike = [one for one in findings if one.rate >= 0.99 * top]
        if top == 0:
            return max(findings, key=lambda one: one.attained)
    else:
        top = max(one.attained for one in findings)
        alike = [one for one in findings if one.attained >= top - 0.01]
    return min(alike, key=lambda one: one.ttft_seconds)


class SameLimits(dict[str, Limits]):
    """The same limits for every size class."""

    def __init__(self, ttft_seconds: float, tpot_seconds: float) -> None:
        super().__init__()
        self._limits = Limits(ttft_seconds, tpot_seconds)

    def __missing__(self, size_class: str) -> Limits:
        return self._limits
