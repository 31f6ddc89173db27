"""All deployments at one rate: the share of requests in time, and what a request costs each process. Nothing here sends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

from chiasm.bench.alone import Alone
from chiasm.bench.goodput import Limits, Trial, Trials, in_time
from chiasm.bench.goodput_outcome import Found, limits_in_words, tested_of
from chiasm.bench.measurement import Figure, Outcome, Panel, Series
from chiasm.bench.statistics import Estimate, bootstrap

Statistic = Callable[[Sequence[Trial]], float]


class FixedRate:
    """Stands in for a search: every round is at one rate, for all deployments."""

    over = False

    def __init__(self, names: Sequence[str], rate: float) -> None:
        self.trials = Trials(names)
        self._rate = rate

    def next_rate(self) -> float:
        return self._rate

    def names_at(self, rate: float) -> list[str]:
        return list(self.trials.of)


def outcome_at(
    rate: float, found: Found, limits: Mapping[str, Limits], alone: Mapping[str, Alone], *, seed: int
) -> Outcome:
    """Return figures, samples and trials, and as the first note how the shares are to be read."""
    by_class = {name: asdict(limit) for name, limit in limits.items()}
    outcome = Outcome(parameters={"limits": by_class, "rate": rate})
    outcome.notes.append(
        f"These are shares at {rate:.3g} requests per second, not goodputs. A request that is given up costs less CPU time, so "
        "compare that only where shares are alike."
    )
    for traffic, arms in found.items():
        outcome.figures += _compared(traffic, arms, seed)
        for name, trials in arms.of.items():
            if trials:
                outcome.figures += _figures(f"{traffic}: {name}", trials, seed)
                good, sent = sum(trial.good for trial in trials), sum(len(trial.served) for trial in trials)
                outcome.notes.append(f"{traffic}: {name} answered {good} of {sent} in time.")
            else:
                outcome.notes.append(f"{traffic}: {name} has no trial, so it is not compared.")
            outcome.trials += [{"traffic": traffic, "arm": name, **trial.summary()} for trial in trials]
        outcome.panels += _panels(f"{traffic}, {rate:.3g} a second", arms)
    for name, taken in alone.items():
        for size_class, one in taken.items():
            figure = Figure(f"alone, {size_class}: {name}, first token", 1000 * one.ttft_seconds, "ms")
            outcome.figures.append(figure)
    outcome.notes.append(limits_in_words(limits))
    return outcome


def _figures(name: str, trials: Sequence[Trial], seed: int) -> list[Figure]:
    """Return the share in time, and the CPU time per request in all and of each process if it is known."""
    figures = [Figure.of(f"{name}, in time", bootstrap(trials, lambda some: 100 * in_time(some), seed), "%")]
    if all(trial.process_seconds for trial in trials):
        total = bootstrap(trials, lambda some: 1000 * _cpu_seconds(some), seed)
        figures.append(Figure.of(f"{name}, CPU time per request", total, "ms"))
        sent = sum(len(trial.served) for trial in trials)
        for process in dict.fromkeys(process for trial in trials for process in trial.process_seconds):
            seconds = sum(trial.process_seconds.get(process, 0.0) for trial in trials) / sent
            figures.append(Figure(f"{name}, CPU time per request of {process}", 1000 * seconds, "ms"))
    return figures


def _cpu_seconds(trials: Sequence[Trial]) -> float:
    return sum(trial.cpu_seconds or 0.0 for trial in trials) / sum(len(trial.served) for trial in trials)


def _compared(traffic: str, arms: Trials, seed: int) -> list[Figure]:
    """Return the ratios of the tested deployment to each of the others, in the rounds that both have."""
    tested = tested_of(arms.of)
    figures = []
    for other in arms.of:
        pairs = _pairs(arms.of[other], arms.of[tested])
        if other == tested or not pairs:
            continue
        if (shares := _ratio(pairs, in_time, seed)) is not None:
            figures.append(Figure.of(f"{traffic}: {tested} / {other}, in time", shares, "x"))
        known = all(trial.process_seconds for pair in pairs for trial in pair)
        if known and (costs := _ratio(pairs, _cpu_seconds, seed)) is not None:
            figures.append(Figure.of(f"{traffic}: {tested} / {other}, CPU time per request", costs, "x"))
    return figures


def _pairs(baseline: Sequence[Trial], other: Sequence[Trial]) -> list[tuple[Trial, Trial]]:
    by_seed = {trial.seed: trial for trial in other}
    return [(trial, by_seed[trial.seed]) for trial in baseline if trial.seed in by_seed]


def _ratio(pairs: Sequence[tuple[Trial, Trial]], statistic: Statistic, seed: int) -> Estimate | None:
    """Estimate by what factor the second trials of pairs differ; None if some of the first ones have nothing."""
    if any(statistic([before]) == 0 for before, _ in pairs):
        return None

    def ratio(some: Sequence[tuple[Trial, Trial]]) -> float:
        return statistic([after for _, after in some]) / statistic([before for before, _ in some])

    return bootstrap(pairs, ratio, seed)


def _panels(title: str, arms: Trials) -> list[Panel]:
    tried = {name: trials for name, trials in arms.of.items() if trials}
    firsts = {
        name: [1000 * one.ttft_seconds for trial in trials for one in trial.served if one.ttft_seconds is not None]
        for name, trials in tried.items()
    }
    shares = [Series(name, [100 * trial.attained for trial in trials]) for name, trials in tried.items()]
    panels = [Panel(f"goodput: {title}", "% in time", shares)]
    if all(firsts.values()):
        panels.append(
            Panel(
                f"goodput: {title}",
                "ms to first token, where one came",
                [Series(name, values) for name, values in firsts.items()],
            )
        )
    return panels
