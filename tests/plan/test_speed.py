"""How fast a machine was, by what requests took alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from chiasm.bench.alone import Alone, Unloaded
from chiasm.bench.traffic import Shape
from chiasm.plan.check import arms_on
from chiasm.plan.costs import StepShape
from chiasm.plan.layouts import Candidate
from chiasm.plan.speed import Adjusted, Speed, speed_of

from .models import CPU, SHAPE, SimpleCosts, asked, simulate

COSTS = SimpleCosts(step=0.002, row=0.001, encode=0.2, prepare=0.01)
ARMS = arms_on(CPU, SHAPE)
SHAPES = {shape.size_class: shape for shape in (Shape(n, (), 8) for n in (30, 100, 400))} | {
    "images": Shape(20, ((512, 512),), 8)
}


def taken(speed: Speed, arms: Mapping[str, Candidate] = ARMS) -> dict[str, Alone]:
    """What requests take alone at a speed."""
    found: dict[str, Alone] = {}
    for arm, candidate in arms.items():
        found[arm] = {}
        for name, shape in SHAPES.items():
            request = asked(text=shape.prompt_tokens, images=len(shape.images), answer=shape.answer_tokens)
            (outcome,) = simulate(candidate, [request], costs=Adjusted(COSTS, speed)).outcomes
            assert outcome.first_token is not None
            assert outcome.tpot_seconds is not None
            found[arm][name] = Unloaded(outcome.first_token, outcome.tpot_seconds)
    return found


@pytest.mark.parametrize("speed", [Speed(1.0, 0.0, 0.0), Speed(1.5, 0.02, 0.0), Speed(0.7, 0.004, 0.0)])
def test_the_speed_is_found_by_what_requests_take(speed: Speed) -> None:
    found = speed_of(taken(speed), SHAPES, ARMS, SHAPE, COSTS)
    assert found.slowness == pytest.approx(speed.slowness, rel=0.03)
    assert found.request_seconds == pytest.approx(speed.request_seconds, abs=1e-3)
    assert found.step_seconds == pytest.approx(0.0, abs=1e-4)


def test_what_steps_take_besides_is_found_by_later_tokens() -> None:
    found = speed_of(taken(Speed(1.2, 0.01, 0.003)), SHAPES, ARMS, SHAPE, COSTS)
    assert found.step_seconds == pytest.approx(0.003, rel=0.35)  # a prompt's own step has them too


def test_requests_never_take_less_than_nothing_besides() -> None:
    split = taken(Speed(1.0, 0.0, 0.0))["split"]
    alone = {"split": {name: replace(one, ttft_seconds=0.9 * one.ttft_seconds - 0.004) for name, one in split.items()}}
    found = speed_of(alone, SHAPES, ARMS, SHAPE, COSTS)
    assert found.request_seconds == 0
    assert 0.5 < found.slowness < 0.9


@pytest.mark.parametrize("alone", [{}, {"split": {}}, {"mine": taken(Speed(2.0, 0.0, 0.0))["split"]}])
def test_without_a_measurement_costs_stay_as_they_are(alone: dict[str, Alone]) -> None:
    assert speed_of(alone, SHAPES, ARMS, SHAPE, SimpleCosts(request=0.008)) == Speed(1.0, 0.008, 0.0)


def test_costs_at_another_speed() -> None:
    costs = Adjusted(SimpleCosts(step=0.01, row=0.0, encode=0.2, prepare=0.1, move=0.05), Speed(2.0, 0.003, 0.001))
    assert costs.step_seconds(StepShape(1), 1) == pytest.approx(0.021)
    assert costs.encode_seconds(512, 512, 2) == pytest.approx(0.2)
    assert costs.prepare_seconds(512, 512) == pytest.approx(0.2)
    assert costs.embedding_seconds(10) == costs.kv_seconds(10) == pytest.approx(0.1)
    assert costs.request_seconds == 0.003
