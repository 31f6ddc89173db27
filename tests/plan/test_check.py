"""Simulated rates beside measured ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from chiasm.bench.goodput import Limits, Served, Trial, Trials, Verdict
from chiasm.bench.goodput_outcome import outcome_of
from chiasm.bench.report import write_json
from chiasm.bench.traffic import MIXES
from chiasm.errors import ConfigurationError
from chiasm.plan.check import arms_on, check, compare, read_measured
from chiasm.plan.costs import CostModel
from chiasm.plan.devices import parse_devices
from chiasm.plan.layouts import Place, places_of
from chiasm.plan.search import Planner, Workload
from chiasm.wire import Role
from tests.plan.models import CPU, SHAPE, SimpleCosts

LIMITS = {
    shape.size_class: Limits(0.5, 0.1)
    for mix in ("text", "images")
    for seed in range(4)
    for shape in (arrival.shape for arrival in MIXES[mix].pattern(seed))
}


def cost_of(place: Place) -> CostModel:
    return SimpleCosts()


def results(folder: Path, rate: float) -> Path:
    """What the benchmark writes when each deployment passes at ``rate`` and fails a little above."""
    arms = list(arms_on(CPU, SHAPE))
    found = {mix: Trials(arms) for mix in ("text", "images")}
    for trials in found.values():
        for arm in arms:
            for seed in (0, 1):
                for factor, verdict in ((1.0, Verdict.GOOD), (1.01, Verdict.LATE)):
                    trials.add(arm, Trial(factor * rate, seed, [Served("text up to 64 tokens", verdict, 0.1)] * 50))
    path = folder / "results.json"
    outcome = outcome_of(found, LIMITS, seed=0)
    outcome.parameters["model"] = SHAPE.name
    write_json(path, {"goodput": outcome}, {})
    return path


def test_what_the_benchmark_writes_is_understood(tmp_path: Path) -> None:
    measured = read_measured(results(tmp_path, 3.0))
    assert set(measured.rates) == {(mix, arm) for mix in ("text", "images") for arm in arms_on(CPU, SHAPE)}
    assert measured.rates["text", "split"] == pytest.approx(3.0, rel=0.1)
    assert measured.limits == LIMITS
    assert measured.seeds == [0, 1]
    assert measured.model == SHAPE.name


def test_every_mix_and_deployment_is_compared(tmp_path: Path) -> None:
    measured = read_measured(results(tmp_path, 3.0))
    workload = Workload(MIXES["text"], LIMITS, seeds=2, requests=MIXES["text"].requests, longest_seconds=12.0)
    expected = Planner(SHAPE, workload, cost_of, places_of([CPU])).highest_rate(arms_on(CPU, SHAPE)["split"]).rate
    compared = {(one.mix, one.arm): one for one in compare(measured, SHAPE, cost_of, CPU)}
    assert len(compared) == 8
    assert compared["text", "split"].simulated == pytest.approx(expected)


def test_rates_that_are_far_off_give_an_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(results(tmp_path, 1000.0), SHAPE, cost_of, [CPU], as_json=True) == 1
    printed = json.loads(capsys.readouterr().out)
    assert not printed["within"]
    assert len(printed["compared"]) == 8


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"measurements": {"goodput": {"notes": [], "figures": []}}}'])
def test_another_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ConfigurationError, match="is not a results"):
        read_measured(tmp_path / "results.json")


def test_gpus_are_not_compared_with_cores(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="--devices cpu:N"):
        check(results(tmp_path, 3.0), SHAPE, cost_of, parse_devices("1xH100"), as_json=False)


def test_a_measurement_of_another_model_is_refused(tmp_path: Path) -> None:
    other = replace(SHAPE, name="folders/other")
    with pytest.raises(
        ConfigurationError, match=f"measured with {SHAPE.name}; give that as MODEL in place of folders/other"
    ):
        check(results(tmp_path, 3.0), other, cost_of, [CPU], as_json=True)


def test_the_benchmarks_deployments_have_all_cores_of_an_odd_number() -> None:
    arms = arms_on(replace(CPU, cores=7), SHAPE)
    assert [one.threads for one in arms["replicas"].instances] == [2, 2, 2, 1]
    assert [(one.role, one.threads) for one in arms["split"].instances] == [(Role.ENCODER, 3), (Role.PD, 4)]
