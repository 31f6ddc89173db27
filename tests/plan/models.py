"""A small model with simple costs, on which a simulation can be checked by hand."""

from __future__ import annotations

from dataclasses import dataclass

from chiasm.bench.traffic import Arrival, Shape
from chiasm.plan.costs import CostModel, StepShape
from chiasm.plan.devices import Cpu
from chiasm.plan.layouts import Candidate
from chiasm.plan.outcome import Result
from chiasm.plan.search import SameLimits
from chiasm.plan.shapes import LanguageShape, ModelShape, VisionShape, fixed
from chiasm.plan.simulation import Simulation

IMAGE_TOKENS = 100
SHAPE = ModelShape(
    "small",
    LanguageShape(layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, intermediate=128, vocab=512),
    VisionShape(layers=2, hidden=32, intermediate=64, gated=False, patches_per_token=4),
    entry_width=64,
    max_model_len=4096,
    tokens_of=fixed(IMAGE_TOKENS),
)
CPU = Cpu(2)
LOOSE = SameLimits(1e6, 1e6)


@dataclass(frozen=True)
class SimpleCosts(CostModel):
    """Work is divided by the number of threads, so two cores are twice as fast as one."""

    step: float = 0.01
    row: float = 0.001
    encode: float = 0.2
    prepare: float = 0.0
    move: float = 0.0
    request: float = 0.0
    token: float = 0.0

    def step_seconds(self, step: StepShape, threads: int) -> float:
        return (self.step + self.row * step.rows) / threads

    def encode_seconds(self, height: int, width: int, threads: int) -> float:
        return self.encode / threads

    def prepare_seconds(self, height: int, width: int) -> float:
        return self.prepare

    def embedding_seconds(self, tokens: int) -> float:
        return self.move

    def kv_seconds(self, tokens: int) -> float:
        return self.move

    @property
    def request_seconds(self) -> float:
        return self.request

    @property
    def token_seconds(self) -> float:
        return self.token


def asked(
    time: float = 0.0, *, text: int = 20, images: int = 0, answer: int = 4, names: tuple[str, ...] = ()
) -> Arrival:
    return Arrival(time, Shape(text, ((512, 512),) * images, answer, names))


def simulate(
    candidate: Candidate,
    arrivals: list[Arrival],
    *,
    rate: float = 1.0,
    costs: CostModel | None = None,
    limits: SameLimits | None = None,
) -> Result:
    used = costs or SimpleCosts()
    return Simulation(candidate, SHAPE, [used] * len(candidate.places), arrivals, limits=limits).run(rate)
