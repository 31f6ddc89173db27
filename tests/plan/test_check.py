"""Simulated rates beside measured ones."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from chiasm.bench.alone import Alone, Unloaded
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


COSTS = SimpleCosts()


def cost_of(place: Place) -> CostModel:
    return COSTS


def results(
    folder: Path, rate: float, *, simulated: CostModel | None = None, alone: dict[str, Alone] | None = None
) -> Path:
    """What the benchmark writes when each deployment passes at ``rate`` and fails a little above.

    With ``simulated``, it is what a simulation with these costs gives.
    """
    arms = arms_on(CPU, SHAPE)
    found = {mix: Trials(list(arms)) for mix in ("text", "images")}
    for mix, trials in found.items():
        workload = Workload(MIXES[mix], LIMITS, seeds=1, requests=MIXES[mix].requests)
        planner = Planner(SHAPE, workload, lambda place: simulated or COSTS, places_of([CPU]))
        for arm, candidate in arms.items():
            for seed in (0, 1):
                for factor, verdict in ((1.0, Verdict.GOOD), (1.01, Verdict.LATE)):
                    trial = Trial(factor * rate, seed, [Served("text up to 64 tokens", verdict, 0.1)] * 30)
                    if simulated is not None:
                        arrivals = MIXES[mix].pattern(seed)[:30]
                        trial = planner.trial(candidate, arrivals, (1 + factor * seed) * rate, seed)
                    trials.add(arm, trial)
    path = folder / "results.json"
    outcome = outcome_of(found, LIMITS, seed=0)
    outcome.parameters["model"] = SHAPE.name
    if alone is not None:
        outcome.parameters["alone"] = {
            arm: {name: asdict(one) for name, one in classes.items()} for arm, classes in alone.items()
        }
    write_json(path, {"goodput": outcome}, {})
    return path


def test_what_the_benchmark_writes_is_understood(tmp_path: Path) -> None:
    alone = {"split": {"text up to 64 tokens": Unloaded(0.1, 0.01)}}
    measured = read_measured(results(tmp_path, 3.0, alone=alone))
    assert len(measured.trials) == 2 * 4 * 2 * 2
    first = measured.trials[0]
    assert (first.mix, first.rate, first.seed, first.requests, first.good) == ("text", 3.0, 0, 30, 30)
    assert first.trial.attained == 1.0
    assert measured.mixes == ["text", "images"]
    assert measured.limits == LIMITS
    assert measured.alone == alone
    assert measured.model == SHAPE.name


def test_every_mix_and_deployment_is_compared(tmp_path: Path) -> None:
    compared = list(compare(read_measured(results(tmp_path, 3.0)), SHAPE, COSTS, CPU))
    assert len({(one.mix, one.arm) for one in compared}) == 8
    for one in compared:
        assert one.requests == 4 * 30
        assert one.measured_in_time == 0.5
        assert one.measured == pytest.approx(3.0, rel=0.1)


def test_what_is_simulated_equals_what_was_measured_if_the_model_is_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = results(tmp_path, 1.5, simulated=COSTS)
    assert check(path, SHAPE, cost_of, [CPU], as_json=True) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["within"]
    assert {one["off"] for one in printed["compared"]} == {0.0}
    assert min(one["measured_in_time"] for one in printed["compared"]) < 0.9


def test_rates_that_are_far_off_give_an_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(results(tmp_path, 1000.0), SHAPE, cost_of, [CPU], as_json=True) == 1
    printed = json.loads(capsys.readouterr().out)
    assert not printed["within"]
    assert len(printed["compared"]) == 8


def test_the_table_says_how_slow_the_machine_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(results(tmp_path, 1.5, simulated=COSTS), SHAPE, cost_of, [CPU], as_json=False) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "computing took 1.00 times what was calibrated, with 0.0 ms for each request" in printed
    assert re.search(r"\b([1-8]) of \1 rates are within 15%", printed)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"measurements": {"goodput": {"notes": [], "figures": []}}}'])
def test_another_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ConfigurationError, match="is not a results"):
        read_measured(tmp_path / "results.json")


@pytest.mark.parametrize(
    "wrong", [{"good": 31}, {"good": -1}, {"requests": 0, "good": 0}, {"rate": 0.0}, {"rate": 1e999}]
)
def test_a_trial_that_cannot_be_is_refused(tmp_path: Path, wrong: dict[str, float]) -> None:
    path = results(tmp_path, 3.0)
    written = json.loads(path.read_text())
    written["measurements"]["goodput"]["trials"][0] |= wrong
    path.write_text(json.dumps(written))
    with pytest.raises(ConfigurationError, match="there is no such trial"):
        read_measured(path)


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
