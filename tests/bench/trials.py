"""Invented trials."""

from __future__ import annotations

from chiasm.bench.goodput import Trial, Trials


def trials_of(**trials: list[Trial]) -> Trials:
    """Return the trials of deployments, by name."""
    found = Trials(list(trials))
    for name, several in trials.items():
        for trial in several:
            found.add(name, trial)
    return found
