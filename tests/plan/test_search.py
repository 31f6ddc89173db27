"""What a plan says of candidates."""

from __future__ import annotations

from dataclasses import replace

import pytest

from chiasm.bench.goodput import TARGET
from chiasm.bench.traffic import MIXES
from chiasm.errors import ConfigurationError
from chiasm.plan.costs import CostModel
from chiasm.plan.layouts import Place, aggregated_on_cpu, colocated_on_cpu, places_of, split_on_cpu
from chiasm.plan.report import Plan, to_json
from chiasm.plan.search import Finding, Planner, SameLimits, Workload, best
from tests.plan.models import CPU, SHAPE, SimpleCosts

COSTS = SimpleCosts()
COLOCATED, SPLIT = colocated_on_cpu(CPU, 2, 2), split_on_cpu(CPU, 1, 1)
WORKLOAD = Workload(MIXES["mixed"], SameLimits(2.0, 0.2), seeds=2, requests=40)


def planner(workload: Workload = WORKLOAD, costs: CostModel = COSTS) -> Planner:
    def cost_of(place: Place) -> CostModel:
        return costs

    return Planner(SHAPE, workload, cost_of, places_of([CPU]))


def plan_of(*findings: Finding, workload: Workload = WORKLOAD) -> Plan:
    return Plan("small", "cpu:2", workload, findings, (), best(findings, by_rate=workload.rate is None))


def test_fewer_are_in_time_at_a_higher_rate() -> None:
    found = [planner().at_rate(SPLIT, rate).attained for rate in (0.1, 4.0, 40.0)]
    assert found[0] == 1.0
    assert found[0] > found[1] > found[2]


def test_the_highest_rate_is_where_nine_of_ten_are_in_time() -> None:
    found = planner().highest_rate(COLOCATED)
    assert planner().at_rate(COLOCATED, 0.7 * found.rate).attained > TARGET
    assert planner().at_rate(COLOCATED, 1.5 * found.rate).attained < TARGET


def test_a_search_ends_where_nothing_is_in_time() -> None:
    impossible = replace(WORKLOAD, limits=SameLimits(1e-4, 1e-4))
    found = planner(impossible).highest_rate(SPLIT)
    assert found.rate == 0
    plan = plan_of(found, workload=impossible)
    assert not plan.met
    assert plan.sentence.startswith("Nothing on cpu:2 answers 90% of mixed in time")


def test_slow_encoders_are_what_limits() -> None:
    images = replace(WORKLOAD, traffic=MIXES["images"])
    assert planner(images, SimpleCosts(encode=1.0)).at_rate(SPLIT, 2.0).limited_by == "encoder"


def test_slow_prefill_is_what_limits() -> None:
    text = replace(WORKLOAD, traffic=MIXES["text"], limits=SameLimits(2.0, 10.0))
    assert planner(text, SimpleCosts(row=0.01)).at_rate(SPLIT, 3.0).limited_by == "prefill"


def test_slow_decode_is_what_limits() -> None:
    text = replace(WORKLOAD, traffic=MIXES["text"])
    assert planner(text, SimpleCosts(step=0.3)).at_rate(SPLIT, 0.2).limited_by == "decode"


def test_slow_transfers_are_what_limits() -> None:
    images = replace(WORKLOAD, traffic=MIXES["images"])
    assert planner(images, SimpleCosts(move=5.0)).at_rate(SPLIT, 0.1).limited_by == "transfer"


def test_the_layout_that_pools_the_cores_is_recommended() -> None:
    made = planner()
    plan = plan_of(*(made.highest_rate(one) for one in (SPLIT, COLOCATED)))
    assert plan.best.candidate is COLOCATED
    assert plan.met
    assert plan.command == "chiasm serve small --layout colocated --encoders 2 --pds 2"


def test_at_a_rate_the_most_in_time_are_recommended() -> None:
    asked = replace(WORKLOAD, rate=8.0)
    made = planner(asked)
    plan = plan_of(*(made.at_rate(one, 8.0) for one in (SPLIT, COLOCATED)), workload=asked)
    assert plan.best.candidate is COLOCATED


def test_device_seconds_count_what_was_answered_in_time() -> None:
    found = planner().at_rate(aggregated_on_cpu(CPU, 1), 1.0)
    assert found.device_seconds == pytest.approx(1000 / found.attained)


def test_json_has_every_candidate() -> None:
    found = planner().at_rate(SPLIT, 1.0)
    content = to_json(plan_of(found, workload=replace(WORKLOAD, rate=1.0)))
    assert content["candidates"][0]["serve_options"] == "--layout split --encoders 1 --pds 1"
    assert content["met"]


def test_more_requests_than_can_be_simulated_are_refused() -> None:
    huge = replace(WORKLOAD, requests=200_000)
    with pytest.raises(ConfigurationError, match="at most 100000"):
        planner(huge)
