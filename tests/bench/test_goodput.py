"""How goodput is judged, searched and compared."""

from __future__ import annotations

import math
import random

import pytest

from chiasm.bench.goodput import Curve, Goodput, Limits, RateSearch, Served, Trial, Verdict, fit, judge, ratio
from chiasm.bench.goodput_outcome import advice, outcome_of

_LIMITS = Limits(1.0, 0.1)


def _trial(rate: float, share: float, *, seed: int = 0, number: int = 50) -> Trial:
    good = round(share * number)
    return Trial(rate, seed, [Served("x", Verdict.GOOD)] * good + [Served("x", Verdict.LATE)] * (number - good))


def _searched(curve: Curve, *, first: float = 1.0, seeds: int = 6, noise: float = 0.03) -> Goodput:
    """Search a deployment that attains what a curve says, give or take some noise."""
    generator = random.Random(0)
    search = RateSearch(first, first / 100)
    for seed in (-1,) * 7 + tuple(range(seeds)):
        if seed < 0 and search.bracketed:
            continue
        rate = search.next_rate()
        search.add(_trial(rate, min(1, max(0, curve.attained(rate) + generator.gauss(0, noise))), seed=seed))
    return Goodput(search.trials, range(seeds))


@pytest.mark.parametrize(
    ("ttft", "tpot", "verdict"),
    [
        (1.0, 0.1, Verdict.GOOD),
        (1.0, None, Verdict.GOOD),
        (1.1, 0.1, Verdict.LATE),
        (1.0, 0.11, Verdict.SLOW),
        (1.1, 0.11, Verdict.LATE),
    ],
)
def test_a_request_is_good_if_both_times_are_within_their_limits(
    ttft: float, tpot: float | None, verdict: Verdict
) -> None:
    assert judge(_LIMITS, ttft, tpot) is verdict


@pytest.mark.parametrize("verdict", [Verdict.LATE, Verdict.SLOW, Verdict.REFUSED, Verdict.FAILED])
def test_every_other_verdict_counts_as_bad(verdict: Verdict) -> None:
    assert Trial(1.0, 0, [Served("x", Verdict.GOOD), Served("x", verdict)]).attained == 0.5


@pytest.mark.parametrize("goodput", [0.2, 1.0, 3.7, 20.0])
@pytest.mark.parametrize("slope", [4.0, 8.0, 16.0])
def test_the_search_finds_the_goodput_within_fifteen_percent(goodput: float, slope: float) -> None:
    assert _searched(Curve(goodput, slope)).rate == pytest.approx(goodput, rel=0.15)


def test_a_search_without_noise_finds_the_goodput_within_five_percent() -> None:
    assert _searched(Curve(3.0, 8.0), noise=0.0).rate == pytest.approx(3.0, rel=0.05)


def test_the_fit_falls_with_the_rate() -> None:
    curve = fit([_trial(1.0, 1.0), _trial(2.0, 0.8), _trial(1.5, 0.95), _trial(4.0, 0.1)])
    shares = [curve.attained(rate) for rate in (0.5, 1, 2, 4, 8)]
    assert shares == sorted(shares, reverse=True)
    assert 1.0 < curve.goodput < 2.0


def test_the_curve_is_at_the_target_at_its_goodput() -> None:
    assert Curve(3.0, 8.0).attained(3.0) == pytest.approx(0.9)
    assert Curve(3.0, 8.0).attained(1e300) == pytest.approx(0.0)


def test_a_search_ends_where_no_rate_meets_the_limits() -> None:
    search = RateSearch(1.0, 0.1)
    rates = []
    while not search.hopeless:
        rates.append(search.next_rate())
        search.add(_trial(rates[-1], 0.5))
    assert rates == [1.0, 0.5, 0.25, 0.125, 0.1]
    assert Goodput(search.trials, (0,)).rate == 0.0


def test_a_search_doubles_the_rate_until_a_trial_fails() -> None:
    search = RateSearch(1.0, 0.1)
    for rate in (1.0, 2.0, 4.0):
        assert search.next_rate() == rate
        search.add(_trial(rate, 1.0))
    search.add(_trial(8.0, 0.2))
    assert search.bracketed
    assert 4.0 <= search.next_rate() <= 8.0


def test_the_same_trials_have_the_ratio_one() -> None:
    found = _searched(Curve(3.0, 8.0))
    estimate = ratio(found, found, seed=0)
    assert estimate is not None
    assert (estimate.low, estimate.value, estimate.high) == (1.0, 1.0, 1.0)


def test_the_interval_of_a_ratio_contains_it() -> None:
    estimate = ratio(_searched(Curve(2.0, 8.0)), _searched(Curve(3.0, 8.0)), seed=0)
    assert estimate is not None
    assert estimate.low <= estimate.value <= estimate.high
    assert estimate.value == pytest.approx(1.5, rel=0.15)


def test_nothing_is_compared_with_a_deployment_without_goodput() -> None:
    none = Goodput([_trial(1.0, 0.5)], (0,))
    some = _searched(Curve(2.0, 8.0))
    assert ratio(none, some, seed=0) is None
    estimate = ratio(some, none, seed=0)
    assert estimate is not None
    assert estimate.value == 0.0


def test_the_mix_in_which_the_colocated_layout_loses_comes_first() -> None:
    slow, fast = _searched(Curve(1.0, 8.0)), _searched(Curve(2.0, 8.0))
    found = {"text": {"aggregated": slow, "colocated": fast}, "heavy": {"aggregated": fast, "colocated": slow}}
    outcome = outcome_of(found, {"text": _LIMITS}, seed=0)
    assert outcome.figures[0].name == "heavy: colocated / aggregated"
    assert outcome.figures[0].at_least == 1.1
    assert [panel.title for panel in outcome.panels] == ["goodput: heavy", "goodput: text"]
    assert len(outcome.trials) == sum(len(one.trials) for arms in found.values() for one in arms.values())


def test_the_advice_names_the_deployment_that_answers_most_in_time() -> None:
    slow, fast = _searched(Curve(1.0, 8.0)), _searched(Curve(2.0, 8.0))
    text = advice({"text": {"aggregated": slow, "colocated": fast}})
    assert text.startswith("For this model on this machine use colocated: ")
    assert "as aggregated" in text


def test_limits_that_nothing_meets_are_said() -> None:
    none = Goodput([_trial(1.0, 0.5)], (0,))
    outcome = outcome_of({"text": {"aggregated": none, "colocated": none}}, {}, seed=0)
    assert outcome.notes[0].startswith("No deployment meets the limits of time at any rate")
    assert "text: aggregated meets the limits at no rate that was tried; at best 50 %" in " ".join(outcome.notes)


def test_a_summary_counts_every_verdict_once() -> None:
    trial = Trial(2.0, 3, [Served("x", verdict, 0.5, 0.1) for verdict in Verdict])
    summary = trial.summary()
    assert all(summary[str(verdict)] == 1 for verdict in Verdict)
    assert math.isclose(trial.attained, 1 / len(Verdict))
