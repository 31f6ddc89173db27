"""Several proxies in front of the same language instances, simulated with the proxies' own placement."""

from __future__ import annotations

import math
from statistics import fmean

import pytest

from chiasm.bench.several_proxies import Prompt, PromptSimulation, prompts

INSTANCES = 4


@pytest.fixture(scope="module")
def asked() -> list[Prompt]:
    """Prompts of a second on average, at a load of 0.8."""
    return prompts(1500, mean_seconds=1.0, rate=0.8 * INSTANCES, seed=1)


def ttft(
    asked: list[Prompt], *, proxies: int = 3, report_seconds: float | None = None, last_report: float = math.inf
) -> float:
    """Return the mean."""
    simulation = PromptSimulation(INSTANCES, proxies=proxies, report_seconds=report_seconds, last_report=last_report)
    return fmean(simulation.run(asked))


def test_proxies_that_learn_the_load_of_instances_come_close_to_a_single_one(asked: list[Prompt]) -> None:
    one, blind = ttft(asked, proxies=1), ttft(asked)
    assert blind > 1.15 * one
    assert ttft(asked, report_seconds=1.0) < min(0.92 * blind, 1.12 * one)
    assert ttft(asked, report_seconds=3.0) < 1.15 * one


def test_loads_that_are_not_told_any_more_do_no_harm(asked: list[Prompt]) -> None:
    assert ttft(asked, report_seconds=1.0, last_report=asked[-1].arrival / 10) < 1.02 * ttft(asked)


def test_a_single_proxy_does_as_well_with_loads_as_without(asked: list[Prompt]) -> None:
    assert ttft(asked, proxies=1, report_seconds=1.0) == pytest.approx(ttft(asked, proxies=1), rel=0.01)
