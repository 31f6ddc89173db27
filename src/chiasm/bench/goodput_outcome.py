"""What the goodput of several deployments means: figures, curves, and which deployment to use."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict

from chiasm.bench.goodput import Limits, Trials
from chiasm.bench.goodput_curves import panels_of
from chiasm.bench.goodput_options import AGGREGATED, COLOCATED, REPLICAS, SPLIT
from chiasm.bench.measurement import Figure, Outcome
from chiasm.bench.statistics import Estimate, with_bounds

_AT_LEAST, _LOW_AT_LEAST = 1.0, 0.97
_OVER_AGGREGATED = {"heavy": 1.1, "repeats": 1.2}
"""How many times the goodput of aggregated deployments the colocated one shall have on some mixes."""

Found = Mapping[str, Trials]
"""By the traffic's name."""


def outcome_of(found: Found, limits: Mapping[str, Limits], *, seed: int) -> Outcome:
    """Return figures, curves and trials, those first in which the split loses most, and as the first note what to use."""
    names = list(dict.fromkeys(name for arms in found.values() for name in arms.of))
    tested = tested_of(names)
    by_class = {name: asdict(limit) for name, limit in limits.items()}
    outcome = Outcome(parameters={"limits": by_class}, notes=[advice(found, seed=seed)])
    ordered = sorted(found, key=lambda traffic: _against_best(found[traffic], tested))
    for traffic in ordered:
        arms = found[traffic]
        outcome.figures += _ratios(traffic, arms, tested, seed)
        for name, trials in arms.of.items():
            if not arms.is_tried(name):
                outcome.notes.append(f"{traffic}: {name} has no trial, so it is not compared.")
                continue
            outcome.figures.append(Figure(f"{traffic}: {name}", arms.rate(name), "requests/s"))
            if (seconds := arms.cpu_seconds_per_request(name)) is not None:
                outcome.figures.append(Figure(f"{traffic}: {name}, CPU time per request", 1000 * seconds, "ms"))
            if not arms.rate(name):
                outcome.notes.append(_why_none(traffic, name, arms))
            elif all(trial.passed for trial in trials):
                outcome.notes.append(
                    f"{traffic}: {name} failed at no rate that was tried; its goodput is an extrapolation."
                )
            summaries = [trial.summary() for trial in trials]
            outcome.trials += [{"traffic": traffic, "arm": name, **summary} for summary in summaries]
        if arms.rounds:
            outcome.panels += panels_of(traffic, arms)
    outcome.notes.append(limits_in_words(limits))
    return outcome


def tested_of(names: Collection[str]) -> str:
    """Return the deployment that the others are compared with."""
    return next((name for name in (COLOCATED, SPLIT) if name in names), list(names)[-1])


def limits_in_words(limits: Mapping[str, Limits]) -> str:
    """Return a sentence with the limits of each size class."""
    shown = [
        f"{name} {1000 * limit.ttft_seconds:.0f} ms, {1000 * limit.tpot_seconds:.1f} ms"
        for name, limit in limits.items()
    ]
    return f"Limits of the time to first token and per token: {'; '.join(shown)}."


def _against_best(arms: Trials, tested: str) -> float:
    best = max((arms.rate(name) for name in arms.of if name != tested), default=0.0)
    return arms.rate(tested) / best if best and arms.is_tried(tested) else math.inf


def _ratios(traffic: str, arms: Trials, tested: str, seed: int) -> list[Figure]:
    """Return the ratios of the tested deployment to the others, with targets if it is the colocated one."""
    if not arms.is_tried(tested):
        return []
    judged = tested == COLOCATED
    figures = []
    others = sorted((name for name in arms.of if name != tested), key=lambda name: -arms.rate(name))
    for place, other in enumerate(others):
        estimate = arms.ratio(other, tested, seed=seed)
        if estimate is None:
            continue
        name = f"{traffic}: {tested} / {other}"
        wanted = _OVER_AGGREGATED.get(traffic) if other in (AGGREGATED, REPLICAS) else None
        if place == 0:
            wanted = max(_AT_LEAST, wanted or 0.0)
        figures.append(Figure.of(name, estimate, "x", at_least=wanted if judged else None))
        if place == 0 and judged:
            figures.append(Figure(f"{name}, low end of the interval", estimate.low, "x", at_least=_LOW_AT_LEAST))
    return figures


def _why_none(traffic: str, name: str, arms: Trials) -> str:
    if name in arms.unable:
        return f"{traffic}: {name} misses the limits even with one request at a time, so no rate was tried."
    best = max(arms.of[name], key=lambda trial: trial.attained)
    return (
        f"{traffic}: {name} meets the limits at no rate that was tried; at best {100 * best.attained:.0f} % of the "
        f"requests met them, at {best.rate:.2g} per second."
    )


# ---- which one to use --------------------------------------------------------------------------------------------------


def advice(found: Found, *, seed: int = 0) -> str:
    """Return a sentence that says which deployment to use, what it gains over the others, and which ones can't be told apart.

    Deployments are compared by the geometric mean of their goodputs on all traffic that at least one of them can answer.
    """
    tried = {traffic: arms for traffic, arms in found.items() if all(arms.is_tried(name) for name in arms.of)}
    if not tried:
        return "Some deployments have no trial, so they cannot be compared."
    names = [name for name in next(iter(tried.values())).of if all(name in arms.of for arms in tried.values())]
    able = {traffic: arms for traffic, arms in tried.items() if any(map(arms.rate, arms.of))}
    if not able:
        return "No deployment meets the limits of time at any rate that was tried; raise the limits, or use a faster machine."
    best, *others = sorted(names, key=lambda name: -_mean(able, name))
    if not others:
        return f"On this machine, {best} answers in time what is listed above; there is nothing to compare it with."
    left_out = "" if len(able) == len(found) else f" (without {', '.join(one for one in found if one not in able)})"
    gains = {other: _overall(able, best, other, seed) for other in others}
    alike = [other for other in others if not _is_apart(able, gains[other])]
    behind = [other for other in others if other not in alike]
    if not alike:
        return (
            f"For this model on this machine use {best}: it answers in time "
            f"{_gain_over(able, best, others[0], gains, seed)}, the next best{left_out}; {_range(able, best, others)}."
        )
    against = " and ".join(_gain_over(able, best, other, gains, seed) for other in alike)
    rest = "".join(f"; {_gain_over(able, best, other, gains, seed, short=True)}" for other in behind)
    return (
        f"For this model on this machine, {_listed([best, *alike])} cannot be told apart: {best} answers in time {against}"
        f"{left_out}{rest}. More rounds (--repeat) may tell them apart."
    )


_LEAST_ROUNDS = 3
"""With fewer, an interval says nothing."""
_ALMOST_NONE = 1e-3
"""What a deployment counts that answers nothing in time, as a share of the best."""


def _is_apart(found: Found, gain: Estimate) -> bool:
    return gain.low > 1 and min(arms.rounds for arms in found.values()) >= _LEAST_ROUNDS


def _mean(found: Found, name: str) -> float:
    """Return the geometric mean, over kinds of traffic, of the goodput relative to the best deployment's."""
    return _geometric_mean([_share({other: arms.rate(other) for other in arms.of}, name) for arms in found.values()])


def _overall(found: Found, best: str, other: str, seed: int) -> Estimate:
    """Estimate the ratio of two deployments' means; the rounds of each kind of traffic are resampled by themselves."""
    drawn = [arms.resampled(seed + number) for number, arms in enumerate(found.values())]

    def mean(name: str, rates: Sequence[Mapping[str, float]]) -> float:
        return _geometric_mean([_share(one, name) for one in rates])

    resampled = [mean(best, rates) / mean(other, rates) for rates in zip(*drawn, strict=True)]
    return with_bounds(_mean(found, best) / _mean(found, other), resampled)


def _share(rates: Mapping[str, float], name: str) -> float:
    return max(_ALMOST_NONE, rates[name] / max(rates.values()))


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def _gain_over(
    found: Found, best: str, other: str, gains: Mapping[str, Estimate], seed: int, *, short: bool = False
) -> str:
    """Say how many times as much a deployment answers as another on the traffic that both can answer, and what only one can.

    ``gains`` are those on all traffic, by the other's name.
    """
    both = {traffic: arms for traffic, arms in found.items() if arms.rate(best) and arms.rate(other)}
    lost = [traffic for traffic, arms in found.items() if not arms.rate(other) and arms.rate(best)]
    won = [traffic for traffic, arms in found.items() if not arms.rate(best) and arms.rate(other)]
    if not both:
        return f"{other} answers nothing of that in time" if short else f"what {other} can't"
    gain = _overall(both, best, other, seed) if lost or won else gains[other]
    text = f"{_times(gain)} {'as many as' if short else 'as many requests per second as'} {other}"
    if lost or won:
        text += f" on {_listed(list(both))}"
    text += f" (which answers no {_listed(lost, 'or')} in time)" if lost else ""
    return text + (f" (which alone answers {_listed(won)} in time)" if won else "")


def _range(found: Found, best: str, others: Sequence[str]) -> str:
    """Say on which traffic a deployment gains least and most over the best of the others, and which it alone can answer."""
    gains = {traffic: _gain(arms, best, others) for traffic, arms in found.items()}
    finite = {traffic: gain for traffic, gain in gains.items() if math.isfinite(gain)}
    said = []
    if finite:
        low, high = min(finite, key=lambda one: finite[one]), max(finite, key=lambda one: finite[one])
        least = f"{finite[low]:.2f} times the best of the others on {low}"
        said.append(least if low == high else f"from {least} to {finite[high]:.2f} times on {high}")
    if alone := [traffic for traffic in gains if traffic not in finite]:
        said.append(f"no other answers {_listed(alone, 'or')} in time")
    return ", and ".join(said)


def _gain(arms: Trials, best: str, others: Sequence[str]) -> float:
    highest = max(map(arms.rate, others))
    return arms.rate(best) / highest if highest else math.inf


def _times(gain: Estimate) -> str:
    return f"{gain.value:.2f} times ({gain.low:.2f} to {gain.high:.2f})"


def _listed(names: Sequence[str], word: str = "and") -> str:
    return f"{', '.join(names[:-1])} {word} {names[-1]}" if len(names) > 1 else names[0]
