"""What the goodput of several deployments means: figures, curves, and which deployment to use."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from chiasm.bench.goodput import TARGET, Limits, Trial, Trials
from chiasm.bench.goodput_options import AGGREGATED, COLOCATED, REPLICAS, SPLIT
from chiasm.bench.measurement import Curve, Curves, Figure, Outcome

_AT_LEAST, _LOW_AT_LEAST = 1.0, 0.97
_OVER_AGGREGATED = {"heavy": 1.1, "repeats": 1.2}
"""How many times the goodput of aggregated deployments the colocated one shall have on some mixes."""
_LINE_STEPS = 40

Found = Mapping[str, Trials]
"""By the traffic's name."""


def outcome_of(found: Found, limits: Mapping[str, Limits], *, seed: int) -> Outcome:
    """Return figures, curves and trials, those first in which the split loses most, and as the first note what to use."""
    names = list(dict.fromkeys(name for arms in found.values() for name in arms.of))
    tested = next((name for name in (COLOCATED, SPLIT) if name in names), names[-1])
    by_class = {name: asdict(limit) for name, limit in limits.items()}
    outcome = Outcome(parameters={"limits": by_class}, notes=[advice(found)])
    ordered = sorted(found, key=lambda traffic: _against_best(found[traffic], tested))
    for traffic in ordered:
        arms = found[traffic]
        outcome.figures += _ratios(traffic, arms, tested, seed)
        for name, trials in arms.of.items():
            outcome.figures.append(Figure(f"{traffic}: {name}", arms.rate(name), "requests/s"))
            if (seconds := arms.cpu_seconds_per_request(name)) is not None:
                outcome.figures.append(Figure(f"{traffic}: {name}, CPU time per request", 1000 * seconds, "ms"))
            if not arms.rate(name):
                outcome.notes.append(_why_none(traffic, name, trials))
            elif all(trial.passed for trial in trials):
                outcome.notes.append(
                    f"{traffic}: {name} failed at no rate that was tried; its goodput is an extrapolation."
                )
            summaries = [trial.summary() for trial in trials]
            outcome.trials += [{"traffic": traffic, "arm": name, **summary} for summary in summaries]
        outcome.panels.append(_curves(traffic, arms))
    shown = [
        f"{name} {1000 * limit.ttft_seconds:.0f} ms, {1000 * limit.tpot_seconds:.1f} ms"
        for name, limit in limits.items()
    ]
    outcome.notes.append(f"Limits of the time to first token and per token: {'; '.join(shown)}.")
    return outcome


def _against_best(arms: Trials, tested: str) -> float:
    best = max((arms.rate(name) for name in arms.of if name != tested), default=0.0)
    return arms.rate(tested) / best if best else math.inf


def _ratios(traffic: str, arms: Trials, tested: str, seed: int) -> list[Figure]:
    """Return the ratios of the tested deployment to the others, with targets if it is the colocated one."""
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


def _why_none(traffic: str, name: str, trials: Sequence[Trial]) -> str:
    if not trials:
        return f"{traffic}: {name} misses the limits even with one request at a time, so no rate was tried."
    best = max(trials, key=lambda trial: trial.attained)
    return (
        f"{traffic}: {name} meets the limits at no rate that was tried; at best {100 * best.attained:.0f} % of the "
        f"requests met them, at {best.rate:.2g} per second."
    )


def _curves(traffic: str, arms: Trials) -> Curves:
    curves = []
    for name, trials in arms.of.items():
        points = [(trial.rate, trial.attained) for trial in trials]
        line: list[tuple[float, float]] = []
        curve = arms.curves[name] if points else None
        if curve is not None:
            low, high = min(points)[0], max(points)[0]
            rates = [low * (high / low) ** (step / _LINE_STEPS) for step in range(_LINE_STEPS + 1)]
            line = [(rate, curve.attained(rate)) for rate in rates]
        curves.append(Curve(f"{name} ({arms.rate(name):.2g}/s)", points, line))
    return Curves(f"goodput: {traffic}", "requests per second", "share in time", curves, TARGET)


# ---- which one to use --------------------------------------------------------------------------------------------------


def advice(found: Found) -> str:
    """Return a sentence that says which deployment to use, and what it gains over the next best and on which traffic."""
    names = [name for name in next(iter(found.values())).of if all(name in arms.of for arms in found.values())]
    able = [traffic for traffic, arms in found.items() if any(map(arms.rate, arms.of))]
    if not able:
        return "No deployment meets the limits of time at any rate; allow more time, or use a faster machine."
    ranked = sorted(names, key=lambda name: -_score(found, able, name))
    best, *others = ranked
    left_out = "" if len(able) == len(found) else f" (without {', '.join(one for one in found if one not in able)})"
    if not others:
        return f"On this machine, {best} answers in time what is listed above; there is nothing to compare it with."
    gains = {traffic: _gain(found[traffic], best, others) for traffic in able}
    low, high = min(gains, key=lambda one: gains[one]), max(gains, key=lambda one: gains[one])
    overall = _score(found, able, best) / max(_score(found, able, others[0]), 1e-12)
    between = f"from {gains[low]:.2f} times the best of the others on {low} to {gains[high]:.2f} times on {high}"
    only = f"{gains[low]:.2f} times the best of the others on {low}"
    return (
        f"For this model on this machine use {best}: it answers in time {overall:.2f} times as many requests per second as "
        f"{others[0]}, the next best{left_out}; {between if len(able) > 1 else only}."
    )


def _score(found: Found, traffics: Sequence[str], name: str) -> float:
    """Return the geometric mean, over kinds of traffic, of the goodput relative to the best deployment's."""
    shares = [found[one].rate(name) / max(map(found[one].rate, found[one].of)) for one in traffics]
    return math.exp(sum(math.log(max(share, 1e-3)) for share in shares) / len(shares))


def _gain(arms: Trials, best: str, others: Sequence[str]) -> float:
    highest = max(map(arms.rate, others))
    return arms.rate(best) / highest if highest else math.inf
