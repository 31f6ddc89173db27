"""How goodput is judged, searched and compared."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import replace

import pytest

from chiasm.bench.goodput import Curve, Limits, RateSearch, Served, Trial, Trials, Verdict, judge
from chiasm.bench.goodput_outcome import advice, outcome_of
from tests.bench.trials import trials_of

_LIMITS = Limits(1.0, 0.1)


def _trial(rate: float, share: float, *, seed: int = 0, number: int = 50) -> Trial:
    good = round(share * number)
    return Trial(rate, seed, [Served("x", Verdict.GOOD)] * good + [Served("x", Verdict.LATE)] * (number - good))


def _searched(curves: Mapping[str, Curve], *, first: float = 1.0, rounds: int = 12, noise: float = 0.05) -> Trials:
    """Search deployments that attain what their curves say, if each round is somewhat harder or easier for all of them."""
    generator = random.Random(0)
    search = RateSearch(list(curves), first, first / 100)
    for seed in range(rounds):
        rate = search.next_rate()
        harder = math.exp(generator.gauss(0, noise))
        for name in search.names_at(rate):
            search.trials.add(name, _trial(rate, curves[name].attained(rate * harder), seed=seed))
    return search.trials


SLOW, FAST = Curve(1.0, 8.0), Curve(2.0, 8.0)


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
    assert _searched({"one": Curve(goodput, slope)}).rate("one") == pytest.approx(goodput, rel=0.15)


def test_a_search_without_noise_finds_the_goodput_within_five_percent() -> None:
    found = _searched({"slow": SLOW, "fast": FAST}, noise=0.0)
    assert found.rate("slow") == pytest.approx(1.0, rel=0.05)
    assert found.rate("fast") == pytest.approx(2.0, rel=0.05)


def test_the_fit_falls_with_the_rate() -> None:
    curve = trials_of(one=[_trial(1.0, 1.0), _trial(2.0, 0.8), _trial(1.5, 0.95), _trial(4.0, 0.1)]).curves["one"]
    assert curve is not None
    shares = [curve.attained(rate) for rate in (0.5, 1, 2, 4, 8)]
    assert shares == sorted(shares, reverse=True)
    assert 1.0 < curve.goodput < 2.0


def test_the_curve_is_at_the_target_at_its_goodput() -> None:
    assert Curve(3.0, 8.0).attained(3.0) == pytest.approx(0.9)
    assert Curve(3.0, 8.0).attained(1e300) == pytest.approx(0.0)


def test_a_search_ends_where_no_rate_meets_the_limits() -> None:
    search = RateSearch(["one"], 1.0, 0.2)
    rates = []
    while not search.over:
        rates.append(search.next_rate())
        search.trials.add("one", _trial(rates[-1], 0.7, seed=len(rates)))
    assert rates == pytest.approx([1.0, 1 / 1.6, 1 / 1.6**2, 1 / 1.6**3, 0.2])
    assert search.trials.rate("one") == 0.0


def test_a_search_raises_the_rate_until_every_deployment_has_failed() -> None:
    search = RateSearch(["slow", "fast"], 1.0, 0.1)
    for seed, rate in enumerate((1.0, 1.6, 2.56)):
        assert search.next_rate() == pytest.approx(rate)
        search.trials.add("fast", _trial(rate, 1.0, seed=seed))
        search.trials.add("slow", _trial(rate, 1.0 if rate == 1.0 else 0.7, seed=seed))
    search.trials.add("fast", _trial(4.1, 0.2, seed=3))
    assert 1.0 <= search.next_rate() <= 4.1


def test_a_deployment_that_has_clearly_failed_is_not_tried_at_higher_rates() -> None:
    search = RateSearch(["slow", "fast"], 1.0, 0.1)
    search.trials.add("slow", _trial(1.0, 0.3))
    search.trials.add("fast", _trial(1.0, 1.0))
    assert search.names_at(2.0) == ["fast"]
    assert search.names_at(0.5) == ["slow"]
    assert search.names_at(1.0) == ["slow", "fast"]


def test_deployments_that_do_the_same_have_the_ratio_one() -> None:
    estimate = _searched({"one": FAST, "other": FAST}).ratio("one", "other", seed=0)
    assert estimate is not None
    assert (estimate.low, estimate.value, estimate.high) == (1.0, 1.0, 1.0)


def test_the_interval_of_a_ratio_contains_it() -> None:
    estimate = _searched({"slow": Curve(2.0, 8.0), "fast": Curve(3.0, 8.0)}).ratio("slow", "fast", seed=0)
    assert estimate is not None
    assert estimate.low <= 1.5 <= estimate.high
    assert estimate.value == pytest.approx(1.5, rel=0.15)


def test_nothing_is_compared_with_a_deployment_without_goodput() -> None:
    found = trials_of(none=[_trial(1.0, 0.5)], some=[_trial(1.0, 1.0), _trial(2.0, 0.5, seed=1)])
    assert found.ratio("none", "some", seed=0) is None
    estimate = found.ratio("some", "none", seed=0)
    assert estimate is not None
    assert estimate.value == 0.0


def test_the_mix_in_which_the_colocated_layout_loses_comes_first() -> None:
    found = {
        "text": _searched({"aggregated": SLOW, "colocated": FAST}),
        "heavy": _searched({"aggregated": FAST, "colocated": SLOW}),
    }
    outcome = outcome_of(found, {"text": _LIMITS}, seed=0)
    assert outcome.figures[0].name == "heavy: colocated / aggregated"
    assert outcome.figures[0].at_least == 1.1
    titles = ["goodput: heavy", "heavy: 90th percentile", "goodput: text", "text: 90th percentile"]
    assert list(dict.fromkeys(panel.title for panel in outcome.panels)) == titles
    assert len(outcome.trials) == sum(len(several) for arms in found.values() for several in arms.of.values())


def _same_rounds(**goodputs: float) -> Trials:
    """What noise-free rounds find of deployments with these goodputs."""
    return _searched({name: Curve(rate, 8.0) for name, rate in goodputs.items()}, noise=0.0)


def test_the_advice_names_the_deployment_that_answers_most_in_time() -> None:
    text = advice({"text": _same_rounds(aggregated=1.0, colocated=2.0)})
    assert text.startswith("For this model on this machine use colocated: it answers in time ")
    assert "as aggregated, the next best" in text


def _some_answers_alone(name: str) -> Trials:
    """Rounds in which only one deployment meets the limits."""
    found = _same_rounds(**{name: 1.0})
    arms = Trials(["aggregated", "colocated", "split"])
    arms.of |= found.of
    arms.unable.update({"aggregated", "colocated", "split"} - {name})
    return arms


def test_the_advice_counts_no_gain_on_what_another_deployment_cannot_answer() -> None:
    both = _same_rounds(aggregated=1.0, split=1.5, colocated=2.0)
    text = advice({"text": both, "heavy": _some_answers_alone("colocated")})
    assert "use colocated: it answers in time 1.3" in text
    assert "as split on text (which answers no heavy in time), the next best; " in text
    assert text.endswith("times the best of the others on text, and no other answers heavy in time.")
    assert "inf" not in text
    assert advice({"heavy": _some_answers_alone("colocated")}).endswith(
        "use colocated: it answers in time what aggregated can't, the next best; no other answers heavy in time."
    )


def test_the_advice_says_what_the_best_deployment_cannot_answer() -> None:
    """Here it is the best of all on the others, by far."""
    both = _same_rounds(aggregated=0.5, split=0.6, colocated=10.0)
    found = {"text": both, "mixed": both, "images": both, "burst": both, "heavy": _some_answers_alone("split")}
    assert "as split on text, mixed, images and burst (which alone answers heavy in time)" in advice(found)


def test_the_advice_says_which_deployments_cannot_be_told_apart() -> None:
    noisy = {
        name: [_trial(1.0, share, seed=seed) for seed, share in enumerate(shares)] for name, shares in _EVEN.items()
    }
    few = [_trial(rate, share, seed=seed) for seed in range(4) for rate, share in ((0.25, 1.0), (1.0, 0.3))]
    none = [_trial(1.0, 0.3, seed=seed) for seed in range(4)]
    text = advice({"text": trials_of(**noisy, split=few, aggregated=none)})
    assert text.startswith("For this model on this machine, ")
    assert (
        "replicas and colocated cannot be told apart" in text or "colocated and replicas cannot be told apart" in text
    )
    assert "as many as split" in text
    assert "; aggregated answers nothing of that in time. " in text


_EVEN = {"replicas": [1.0, 0.8, 1.0, 0.8], "colocated": [0.8, 1.0, 0.8, 1.0]}


def test_two_rounds_tell_nothing_apart() -> None:
    trials = {name: [_trial(1.0, share, seed=seed) for seed in (0, 1)] for name, share in {"a": 1.0, "b": 0.9}.items()}
    assert "a and b cannot be told apart" in advice({"text": trials_of(**trials)})


def test_limits_that_nothing_meets_are_said() -> None:
    found = {"text": trials_of(aggregated=[_trial(1.0, 0.5)], colocated=[_trial(1.0, 0.4)])}
    outcome = outcome_of(found, {}, seed=0)
    assert outcome.notes[0].startswith("No deployment meets the limits of time at any rate")
    assert "text: aggregated meets the limits at no rate that was tried; at best 50 %" in " ".join(outcome.notes)


def _unable(*names: str) -> Trials:
    found = Trials(names)
    found.unable.update(names)
    return found


def test_a_mix_whose_limits_nothing_meets_even_alone_is_said_and_the_others_are_compared() -> None:
    found = {"text": _same_rounds(aggregated=1.0, colocated=2.0), "heavy": _unable("aggregated", "colocated")}
    outcome = outcome_of(found, {}, seed=0)
    assert "use colocated: " in outcome.notes[0]
    assert "(without heavy)" in outcome.notes[0]
    for name in ("aggregated", "colocated"):
        assert (
            f"heavy: {name} misses the limits even with one request at a time, so no rate was tried." in outcome.notes
        )
    assert {figure.name: figure.value for figure in outcome.figures if figure.name.startswith("heavy")} == {
        "heavy: aggregated": 0.0,
        "heavy: colocated": 0.0,
    }
    assert [panel.title for panel in outcome.panels if "heavy" in panel.title] == []


def test_limits_that_nothing_meets_even_alone_on_any_mix_are_said() -> None:
    outcome = outcome_of({"text": _unable("aggregated"), "heavy": _unable("aggregated")}, {}, seed=0)
    assert outcome.notes[0].startswith("No deployment meets the limits of time at any rate")
    assert outcome.panels == []


def test_one_deployment_that_misses_the_limits_alone_loses_to_the_others() -> None:
    found = _same_rounds(aggregated=1.0, colocated=2.0)
    arms = Trials(["aggregated", "colocated", "split"])
    arms.of |= found.of
    arms.unable.add("split")
    outcome = outcome_of({"heavy": arms}, {}, seed=0)
    assert "use colocated: " in outcome.notes[0]
    assert "heavy: split misses the limits even with one request at a time, so no rate was tried." in outcome.notes


def test_a_deployment_without_a_trial_is_compared_with_none() -> None:
    arms = Trials(["aggregated", "colocated"])
    arms.add("aggregated", _trial(1.0, 1.0))
    figures = outcome_of({"text": arms}, {}, seed=0).figures
    assert [figure.name for figure in figures if "CPU" not in figure.name] == ["text: aggregated"]


def test_deployments_that_were_not_tried_before_the_end_are_not_compared() -> None:
    found = {"text": _same_rounds(aggregated=1.0, colocated=2.0), "heavy": Trials(["aggregated", "colocated"])}
    outcome = outcome_of(found, {}, seed=0)
    assert "use colocated: " in outcome.notes[0]
    assert "(without heavy)" in outcome.notes[0]
    assert "heavy: colocated has no trial, so it is not compared." in outcome.notes
    assert [figure.name for figure in outcome.figures if figure.name.startswith("heavy")] == []
    assert "cannot be compared" in advice({"heavy": Trials(["aggregated", "colocated"])})


def test_a_goodput_beyond_all_rates_that_were_tried_is_said_to_be_an_extrapolation() -> None:
    outcome = outcome_of({"text": trials_of(aggregated=[_trial(1.0, 1.0)])}, {}, seed=0)
    assert "text: aggregated failed at no rate that was tried" in " ".join(outcome.notes)


def test_a_summary_counts_every_verdict_once() -> None:
    trial = Trial(2.0, 3, [Served("x", verdict, 0.5, 0.1) for verdict in Verdict])
    summary = trial.summary()
    assert all(summary[str(verdict)] == 1 for verdict in Verdict)
    assert math.isclose(trial.attained, 1 / len(Verdict))


def _measured(rate: float, share: float, cpu_seconds: float | None) -> Trial:
    return replace(_trial(rate, share), process_seconds={} if cpu_seconds is None else {"proxy": cpu_seconds})


def test_the_cpu_time_of_a_request_is_that_of_the_trials_in_which_few_were_given_up() -> None:
    found = trials_of(one=[_measured(1.0, 1.0, 10.0), _measured(2.0, 0.9, 15.0), _measured(3.0, 0.1, 2.0)])
    assert found.cpu_seconds_per_request("one") == 0.25
    figures = {figure.name: figure for figure in outcome_of({"text": found}, {}, seed=0).figures}
    figure = figures["text: one, CPU time per request"]
    assert (figure.value, figure.unit, figure.met) == (250.0, "ms", None)


@pytest.mark.parametrize("trials", [[_measured(1.0, 0.5, 10.0)], [_measured(1.0, 1.0, 1.0), _measured(1.0, 1.0, None)]])
def test_the_cpu_time_of_a_request_is_left_out_if_it_is_not_known(trials: list[Trial]) -> None:
    found = trials_of(one=trials)
    assert found.cpu_seconds_per_request("one") is None
    figures = outcome_of({"text": found}, {}, seed=0).figures
    assert [figure for figure in figures if "CPU time" in figure.name] == []
