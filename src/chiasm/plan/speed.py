"""How fast a machine was while a benchmark ran, by what its requests took when nothing else ran.

Costs are measured once, and a benchmark runs at another time: on a virtual machine, when its neighbours left more or less of
memory and caches, and always with servers between the clients and the model. Requests that were sent one at a time show both,
without any queue, so what a simulation then says of load is left to be checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from chiasm.bench.alone import Alone
from chiasm.bench.statistics import median
from chiasm.bench.traffic import Arrival, Shape
from chiasm.plan.costs import CostModel, StepShape
from chiasm.plan.layouts import Candidate
from chiasm.plan.shapes import ModelShape
from chiasm.plan.simulation import Simulation


@dataclass(frozen=True)
class Speed:
    """What work took in place of what it was measured to cost."""

    slowness: float
    """Computing took so many times as long."""
    request_seconds: float
    """What each request took besides."""
    step_seconds: float
    """What each step took besides."""


class Adjusted(CostModel):
    """Costs at another speed."""

    def __init__(self, costs: CostModel, speed: Speed) -> None:
        self._costs = costs
        self._speed = speed

    def step_seconds(self, step: StepShape, threads: int) -> float:
        return self._speed.slowness * self._costs.step_seconds(step, threads) + self._speed.step_seconds

    def encode_seconds(self, height: int, width: int, threads: int) -> float:
        return self._speed.slowness * self._costs.encode_seconds(height, width, threads)

    def prepare_seconds(self, height: int, width: int) -> float:
        return self._speed.slowness * self._costs.prepare_seconds(height, width)

    def embedding_seconds(self, tokens: int) -> float:
        return self._speed.slowness * self._costs.embedding_seconds(tokens)

    def kv_seconds(self, tokens: int) -> float:
        return self._speed.slowness * self._costs.kv_seconds(tokens)

    @property
    def request_seconds(self) -> float:
        return self._speed.request_seconds

    @property
    def token_seconds(self) -> float:
        return self._costs.token_seconds

    @property
    def busy_factor(self) -> float:
        return self._costs.busy_factor


def speed_of(
    alone: Mapping[str, Alone],
    shapes: Mapping[str, Shape],
    candidates: Mapping[str, Candidate],
    shape: ModelShape,
    costs: CostModel,
) -> Speed:
    """Return the speed at which simulated requests take what measured ones took alone.

    ``alone`` has what was measured, by deployment and size class; ``shapes`` the requests by size class. The times to first
    token are fitted by least squares of the relative errors. Without a measurement, the costs stay as they are.
    """
    computing = Adjusted(costs, Speed(1.0, 0.0, 0.0))
    measured, simulated = [], []
    for name, classes in alone.items():
        for size_class, one in classes.items():
            if name in candidates and size_class in shapes and one.ttft_seconds > 0:
                measured.append(one)
                simulated.append(_alone(candidates[name], shape, computing, shapes[size_class]))
    if len(measured) < 2:
        return Speed(1.0, costs.request_seconds, 0.0)
    slowness, request = _line([first for first, _ in simulated], [one.ttft_seconds for one in measured])
    besides = [one.tpot_seconds - slowness * per_token for one, (_, per_token) in zip(measured, simulated, strict=True)]
    return Speed(slowness, request, max(0.0, median(besides)))


def _alone(candidate: Candidate, shape: ModelShape, costs: CostModel, asked: Shape) -> tuple[float, float]:
    """Return the time to first token of one request, and the time per later token."""
    simulation = Simulation(candidate, shape, [costs] * len(candidate.places), [Arrival(0.0, asked)])
    (outcome,) = simulation.run(1.0).outcomes
    return outcome.first_token or 0.0, outcome.tpot_seconds or 0.0


def _line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """Return the slope and the offset, neither below 0, with which a line comes closest to the points."""
    weights = 1 / np.array(ys)
    terms = np.stack([np.array(xs) * weights, weights], axis=1)
    slope, offset = np.linalg.lstsq(terms, np.ones(len(ys)), rcond=None)[0]
    if slope > 0 and offset > 0:
        return float(slope), float(offset)
    return median([y / x for x, y in zip(xs, ys, strict=True)]), 0.0
