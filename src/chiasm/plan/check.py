"""Compares the rates that a plan would say with those that ``chiasm bench goodput`` has measured on this machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chiasm.bench.goodput import Limits
from chiasm.bench.goodput_options import AGGREGATED, COLOCATED, MOST_REPLICAS, REPLICAS, SPLIT
from chiasm.bench.traffic import LONGEST_SECONDS, MIXES
from chiasm.errors import ConfigurationError
from chiasm.launch.layout import cpu_pairs
from chiasm.plan.costs import CostModel
from chiasm.plan.devices import Cpu, Device
from chiasm.plan.layouts import (
    Candidate,
    Place,
    aggregated_on_cpu,
    colocated_on_cpu,
    free_memory,
    places_of,
    split_on_cpu,
)
from chiasm.plan.report import shown
from chiasm.plan.search import Planner, Workload
from chiasm.plan.shapes import ModelShape

TOLERANCE = 0.15


@dataclass(frozen=True)
class Compared:
    """One deployment under one mix."""

    mix: str
    arm: str
    measured: float
    """Requests per second."""
    simulated: float

    @property
    def off(self) -> float:
        """By how much the simulation is off, relative to what was measured."""
        return self.simulated / self.measured - 1


@dataclass(frozen=True)
class Measured:
    """What results.json says."""

    rates: Mapping[tuple[str, str], float]
    """By mix and arm."""
    limits: Mapping[str, Limits]
    seeds: Sequence[int]
    model: str
    """The name of the checkpoint."""


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
    found = list(compare(measured, shape, cost_of, cpu))
    if not found:
        raise ConfigurationError(f"{path} has no rates of the benchmark's own deployments and mixes to compare with.")
    within = all(abs(one.off) <= TOLERANCE for one in found)
    if as_json:
        print(json.dumps({"within": within, "compared": [{**asdict(one), "off": one.off} for one in found]}, indent=1))
    else:
        _print(found)
    return 0 if within else 1


def read_measured(path: Path) -> Measured:
    """Read results.json of ``chiasm bench goodput``. Raises ConfigurationError if it isn't that."""
    try:
        measurement: Any = json.loads(path.read_text(encoding="utf-8"))["measurements"]["goodput"]
        limits = {
            name: Limits(float(one["ttft_seconds"]), float(one["tpot_seconds"]))
            for name, one in measurement["parameters"]["limits"].items()
        }
        rates = {
            (mix, arm): float(figure["value"])
            for figure in measurement["figures"]
            if figure["unit"] == "requests/s"
            for mix, _, arm in [figure["name"].partition(": ")]
        }
        seeds = sorted({int(trial["seed"]) for trial in measurement["trials"]})
        model = str(measurement["parameters"]["model"])
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ConfigurationError(
            f"--check {path} is not a results.json of `chiasm bench goodput`: {type(error).__name__} {error}."
        ) from error
    return Measured(rates, limits, seeds, model)


def compare(
    measured: Measured, shape: ModelShape, cost_of: Callable[[Place], CostModel], cpu: Cpu
) -> Iterator[Compared]:
    """Yield what is comparable: the benchmark's own deployments and mixes, where a rate was found."""
    arms = arms_on(cpu, shape)
    for mix in dict.fromkeys(mix for mix, _ in measured.rates):
        if mix not in MIXES or not measured.seeds:
            continue
        workload = Workload(
            MIXES[mix],
            measured.limits,
            seed=measured.seeds[0],
            seeds=len(measured.seeds),
            requests=MIXES[mix].requests,
            longest_seconds=LONGEST_SECONDS,
        )
        planner = Planner(shape, workload, cost_of, places_of([cpu]))
        for arm, candidate in arms.items():
            rate = measured.rates.get((mix, arm))
            if rate:
                yield Compared(mix, arm, rate, planner.highest_rate(candidate).rate)


def arms_on(cpu: Cpu, shape: ModelShape) -> dict[str, Candidate]:
    """Return what the benchmark's deployments are on these cores, by their names there."""
    pairs = cpu_pairs(cpu.cores, free_memory(), shape.language_bytes + shape.vision_bytes)
    return {
        AGGREGATED: aggregated_on_cpu(cpu, 1),
        REPLICAS: aggregated_on_cpu(cpu, min(cpu.cores, MOST_REPLICAS), divided=True),
        SPLIT: split_on_cpu(cpu, 1, 1),
        COLOCATED: colocated_on_cpu(cpu, pairs, pairs),
    }


def _print(found: Sequence[Compared]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for title in ("mix", "deployment", "measured req/s", "simulated req/s", "off"):
        table.add_column(title, justify="left" if title in ("mix", "deployment") else "right")
    for one in found:
        table.add_row(one.mix, one.arm, shown(one.measured), shown(one.simulated), f"{100 * one.off:+.0f} %")
    console = Console()
    console.print(table)
    worst = max(found, key=lambda one: abs(one.off))
    number = sum(abs(one.off) <= TOLERANCE for one in found)
    console.print(
        f"{number} of {len(found)} rates are within {TOLERANCE:.0%}; the worst is off by {100 * worst.off:+.0f} % "
        f"({worst.mix}, {worst.arm})."
    )
