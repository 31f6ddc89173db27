"""Simulates the trials that ``chiasm bench goodput`` has made on this machine, and compares what came of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chiasm.bench.alone import Alone, Unloaded, typical
from chiasm.bench.goodput import Limits, Served, Trial, Trials, Verdict, in_time
from chiasm.bench.goodput_options import AGGREGATED, COLOCATED, MOST_REPLICAS, REPLICAS, SPLIT
from chiasm.bench.traffic import MIXES
from chiasm.errors import ConfigurationError
from chiasm.launch.layout import cpu_copies
from chiasm.memory import free_memory
from chiasm.plan.costs import CostModel
from chiasm.plan.devices import Cpu, Device
from chiasm.plan.layouts import (
    Candidate,
    Place,
    aggregated_on_cpu,
    colocated_on_cpu,
    places_of,
    split_on_cpu,
)
from chiasm.plan.report import shown
from chiasm.plan.search import Planner, Workload
from chiasm.plan.shapes import ModelShape
from chiasm.plan.simulation import MAX_REQUESTS
from chiasm.plan.speed import Adjusted, Speed, speed_of

TOLERANCE = 0.15


@dataclass(frozen=True)
class Compared:
    """One deployment under one mix: what was measured, and what the same trials are when they are simulated."""

    mix: str
    arm: str
    requests: int
    measured_in_time: float
    """Share of the requests that met both limits."""
    simulated_in_time: float
    measured: float
    """Goodput, in requests per second."""
    simulated: float

    @property
    def off(self) -> float:
        """By how much the simulated goodput is off, relative to what was measured."""
        return self.simulated / self.measured - 1


@dataclass(frozen=True)
class MeasuredTrial:
    """One trial of the benchmark."""

    mix: str
    arm: str
    rate: float
    seed: int
    requests: int
    good: int

    def __post_init__(self) -> None:
        if not (0 < self.rate < math.inf and 0 <= self.good <= self.requests <= MAX_REQUESTS and self.requests):
            raise ValueError(
                f"there is no such trial: {self.good} of {self.requests} in time at {self.rate} per second"
            )

    @property
    def trial(self) -> Trial:
        """The same, as far as shares go."""
        verdicts = [Verdict.GOOD] * self.good + [Verdict.LATE] * (self.requests - self.good)
        return Trial(self.rate, self.seed, [Served("", verdict) for verdict in verdicts])


@dataclass(frozen=True)
class Measured:
    """What results.json says."""

    trials: Sequence[MeasuredTrial]
    limits: Mapping[str, Limits]
    alone: Mapping[str, Alone]
    """What requests took when nothing else ran, by deployment."""
    model: str
    """The name of the checkpoint."""

    @property
    def mixes(self) -> list[str]:
        """Those of the benchmark's own, in the order of the trials."""
        return list(dict.fromkeys(trial.mix for trial in self.trials if trial.mix in MIXES))


def check(
    path: Path,
    shape: ModelShape,
    cost_of: Callable[[Place], CostModel],
    devices: Sequence[Device],
    *,
    as_json: bool,
) -> int:
    """Print the comparison; return 1 if a rate is off by more than ``TOLERANCE``. Raises ConfigurationError."""
    (cpu,) = devices[:1]
    if not isinstance(cpu, Cpu):
        raise ConfigurationError(
            "--check compares with what was measured on this machine's cores; give --devices cpu:N."
        )
    measured = read_measured(path)
    if measured.model != Path(shape.name).name:
        raise ConfigurationError(
            f"{path} was measured with {measured.model}; give that as MODEL in place of {shape.name}."
        )
    costs = cost_of(places_of([cpu])[0])
    speed = measured_speed(measured, shape, costs, cpu)
    found = list(compare(measured, shape, Adjusted(costs, speed), cpu))
    if not found:
        raise ConfigurationError(f"{path} has no rates of the benchmark's own deployments and mixes to compare with.")
    within = all(abs(one.off) <= TOLERANCE for one in found)
    if as_json:
        compared = [{**asdict(one), "off": one.off} for one in found]
        print(json.dumps({"within": within, "speed": asdict(speed), "compared": compared}, indent=1))
    else:
        _print(found, speed)
    return 0 if within else 1


def read_measured(path: Path) -> Measured:
    """Read results.json of ``chiasm bench goodput``. Raises ConfigurationError if it isn't that."""
    try:
        measurement: Any = json.loads(path.read_text(encoding="utf-8"))["measurements"]["goodput"]
        parameters = measurement["parameters"]
        limits = {
            name: Limits(float(one["ttft_seconds"]), float(one["tpot_seconds"]))
            for name, one in parameters["limits"].items()
        }
        alone = {
            arm: {
                name: Unloaded(float(one["ttft_seconds"]), float(one["tpot_seconds"])) for name, one in classes.items()
            }
            for arm, classes in parameters.get("alone", {}).items()
        }
        trials = [
            MeasuredTrial(
                str(one["traffic"]),
                str(one["arm"]),
                float(one["rate"]),
                int(one["seed"]),
                int(one["requests"]),
                int(one["good"]),
            )
            for one in measurement["trials"]
        ]
        model = str(parameters["model"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigurationError(
            f"--check {path} is not a results.json of `chiasm bench goodput`: {type(error).__name__} {error}."
        ) from error
    return Measured(trials, limits, alone, model)


def measured_speed(measured: Measured, shape: ModelShape, costs: CostModel, cpu: Cpu) -> Speed:
    """Return how fast the machine was while the benchmark ran."""
    seeds = sorted({trial.seed for trial in measured.trials})
    shapes = typical([MIXES[mix] for mix in measured.mixes], seeds)
    return speed_of(measured.alone, shapes, arms_on(cpu, shape), shape, costs)


def compare(measured: Measured, shape: ModelShape, costs: CostModel, cpu: Cpu) -> Iterator[Compared]:
    """Simulate the trials of the benchmark's own deployments and mixes; yield those in which a goodput was found.

    Both goodputs are read off curves that are fitted to the same trials.
    """
    arms = arms_on(cpu, shape)
    for mix in measured.mixes:
        trials = [trial for trial in measured.trials if trial.mix == mix and trial.arm in arms]
        workload = Workload(MIXES[mix], measured.limits, seeds=1, requests=MIXES[mix].requests)
        planner = Planner(shape, workload, lambda place: costs, places_of([cpu]))
        names = list(dict.fromkeys(trial.arm for trial in trials))
        found, simulated = Trials(names), Trials(names)
        for one in trials:
            arrivals = MIXES[mix].pattern(one.seed)[: one.requests]
            found.add(one.arm, one.trial)
            simulated.add(one.arm, planner.trial(arms[one.arm], arrivals, one.rate, one.seed))
        for name in names:
            if rate := found.rate(name):
                requests = sum(trial.requests for trial in trials if trial.arm == name)
                shares = in_time(found.of[name]), in_time(simulated.of[name])
                yield Compared(mix, name, requests, *shares, rate, simulated.rate(name))


def arms_on(cpu: Cpu, shape: ModelShape) -> dict[str, Candidate]:
    """Return what the benchmark's deployments are on these cores, by their names there."""
    pairs = cpu_copies(cpu.cores, free_memory(), shape.language_bytes + shape.vision_bytes)
    return {
        AGGREGATED: aggregated_on_cpu(cpu, 1),
        REPLICAS: aggregated_on_cpu(cpu, min(cpu.cores, MOST_REPLICAS), divided=True),
        SPLIT: split_on_cpu(cpu, 1, 1),
        COLOCATED: colocated_on_cpu(cpu, pairs, pairs),
    }


def _print(found: Sequence[Compared], speed: Speed) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    titles = ("mix", "deployment", "measured in time", "simulated", "measured req/s", "simulated", "off")
    for place, title in enumerate(titles):
        table.add_column(title, justify="left" if place < 2 else "right")
    for one in found:
        shares = (f"{one.measured_in_time:.1%}", f"{one.simulated_in_time:.1%}")
        table.add_row(one.mix, one.arm, *shares, shown(one.measured), shown(one.simulated), f"{100 * one.off:+.0f} %")
    console = Console()
    console.print(table)
    console.print(
        f"When nothing else ran, computing took {speed.slowness:.2f} times what was calibrated, with "
        f"{1000 * speed.request_seconds:.1f} ms for each request and {1000 * speed.step_seconds:.1f} ms for each step besides. "
        "The simulation is as slow."
    )
    worst = max(found, key=lambda one: abs(one.off))
    number = sum(abs(one.off) <= TOLERANCE for one in found)
    console.print(
        f"{number} of {len(found)} rates are within {TOLERANCE:.0%}; the worst is off by {100 * worst.off:+.0f} % "
        f"({worst.mix}, {worst.arm})."
    )
