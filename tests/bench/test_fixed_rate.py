"""Deployments at one rate, by invented trials."""

from __future__ import annotations

import pytest

from chiasm.bench.alone import Unloaded
from chiasm.bench.fixed_rate import FixedRate, outcome_at
from chiasm.bench.goodput import Limits, Served, Trial, Verdict
from chiasm.bench.measurement import Panel
from tests.bench.trials import trials_of

_LIMITS = {"text up to 64 tokens": Limits(1.0, 0.1)}
_ALONE = {"colocated": {"text up to 64 tokens": Unloaded(0.2, 0.01)}}


def _trial(good: int, late: int, *, seed: int = 0, **process_seconds: float) -> Trial:
    served = [Served("x", Verdict.GOOD, 0.5)] * good + [Served("x", Verdict.LATE, 2.0)] * late
    return Trial(4.0, seed, served, process_seconds)


def test_every_round_is_at_the_rate_for_all_deployments() -> None:
    fixed = FixedRate(["one", "other"], 4.0)
    fixed.trials.add("one", _trial(0, 10))
    assert (fixed.next_rate(), fixed.names_at(4.0), fixed.over) == (4.0, ["one", "other"], False)


def test_shares_and_cpu_time_of_each_process_are_reported_and_compared() -> None:
    found = trials_of(
        replicas=[_trial(9, 1, proxy=1.0, aggregated=3.0), _trial(10, 0, seed=1, proxy=1.0, aggregated=3.0)],
        colocated=[_trial(8, 2, proxy=1.0, pd=4.0), _trial(9, 1, seed=1, proxy=1.0, pd=4.0)],
    )
    outcome = outcome_at(4.0, {"images": found}, _LIMITS, _ALONE, seed=0)
    figures = {figure.name: figure for figure in outcome.figures}
    assert figures["images: replicas, in time"].value == 95.0
    assert figures["images: replicas, in time"].low == 90.0
    assert figures["images: colocated, CPU time per request"].value == 500.0
    assert figures["images: colocated, CPU time per request of proxy"].value == 100.0
    assert figures["images: colocated, CPU time per request of pd"].value == 400.0
    assert figures["images: colocated / replicas, in time"].value == pytest.approx(17 / 19)
    assert figures["images: colocated / replicas, CPU time per request"].value == 1.25
    assert figures["alone, text up to 64 tokens: colocated, first token"].value == 200.0
    assert "images: colocated answered 17 of 20 in time." in outcome.notes
    assert "at 4 requests per second" in outcome.notes[0]
    assert len(outcome.trials) == 4
    shares = outcome.panels[0]
    assert isinstance(shares, Panel)
    assert {series.label: series.values for series in shares.series} == {"replicas": [90, 100], "colocated": [80, 90]}


def test_deployments_are_compared_in_the_rounds_that_both_have() -> None:
    found = trials_of(replicas=[_trial(10, 0), _trial(1, 9, seed=1)], colocated=[_trial(10, 0)])
    figures = {figure.name: figure for figure in outcome_at(4.0, {"text": found}, {}, {}, seed=0).figures}
    assert figures["text: colocated / replicas, in time"].value == 1.0
    assert not [name for name in figures if "CPU time" in name]


def test_nothing_is_compared_with_a_deployment_that_has_none_in_time_or_no_trial() -> None:
    found = trials_of(none=[_trial(0, 10)], lost=[], colocated=[_trial(10, 0)])
    outcome = outcome_at(4.0, {"text": found}, {}, {}, seed=0)
    assert {figure.name for figure in outcome.figures} == {"text: none, in time", "text: colocated, in time"}
    assert "text: lost has no trial, so it is not compared." in outcome.notes
