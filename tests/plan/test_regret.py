"""What the placement loses in a plan's simulation against the best choice in hindsight."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from chiasm.bench.traffic import MIXES, Arrival
from chiasm.plan.layouts import Candidate, aggregated_on_cpu, colocated_on_cpu
from chiasm.plan.outcome import Outcome
from chiasm.plan.simulation import Simulation

from ..regret import regret
from .models import CPU, SHAPE, SimpleCosts

COSTS = SimpleCosts(step=0.003, row=0.00015, encode=0.06, prepare=0.01, move=0.001, request=0.004)
WARM_UP, COUNT = 20, 20
COLOCATED, REPLICAS = colocated_on_cpu(CPU, 2, 2), aggregated_on_cpu(CPU, 2, divided=True)


def run(candidate: Candidate, arrivals: Sequence[Arrival], rate: float, forced: dict[int, int]) -> Sequence[Outcome]:
    return Simulation(candidate, SHAPE, [COSTS], arrivals, forced=forced).run(rate).outcomes


def first_token(outcome: Outcome) -> float:
    assert outcome.first_token is not None
    return outcome.first_token


def regret_of(candidate: Candidate, mix: str, rate: float, seed: int) -> float:
    arrivals = MIXES[mix].pattern(seed)[: WARM_UP + COUNT]
    places = [one.instance for one in run(candidate, arrivals, rate, {})]

    def first_tokens(count: int, forced: dict[int, int]) -> list[float]:
        return [first_token(one) for one in run(candidate, arrivals[:count], rate, forced)]

    return regret(first_tokens, places, set(places), warm_up=WARM_UP)


@pytest.mark.parametrize("candidate", [COLOCATED, REPLICAS], ids=["colocated", "replicas"])
@pytest.mark.parametrize(("mix", "rate"), [("mixed", 4.0), ("images", 2.0)])
def test_mean_regret_is_at_most_five_percent(candidate: Candidate, mix: str, rate: float) -> None:
    regrets = [regret_of(candidate, mix, rate, seed) for seed in (31, 32, 33)]
    assert sum(regrets) / len(regrets) <= 0.05


def test_mean_regret_of_short_texts_is_at_most_eight_percent() -> None:
    """Their first tokens come so soon that half of a decode step counts."""
    regrets = [regret_of(COLOCATED, "text", 8.0, seed) for seed in (31, 32, 33)]
    assert sum(regrets) / len(regrets) <= 0.08


def test_a_request_can_be_given_to_any_language_instance() -> None:
    arrivals = MIXES["mixed"].pattern(1)[:10]
    languages = {one.instance for one in run(COLOCATED, MIXES["mixed"].pattern(1), 8.0, {})}
    assert len(languages) == 2
    for instance in languages:
        outcomes = run(COLOCATED, arrivals, 8.0, dict.fromkeys(range(10), instance))
        assert {one.instance for one in outcomes} == {instance}
