"""What a simulated trial shows, request by request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from chiasm.bench.traffic import Shape
from chiasm.plan.shapes import ModelShape
from chiasm.plan.sharing import Stage


@dataclass(eq=False)
class Outcome:
    """What became of one request. Times are seconds from its arrival."""

    shape: Shape
    arrival: float
    instance: int = -1
    """The language instance that it was given to, among the candidate's instances."""
    prompt_tokens: int = 0
    refused: bool = False
    """Not admitted, or lost to a lack of memory."""
    given_up: bool = False
    """Its client left because it took too long."""
    embedded: float = 0.0
    """When the last embedding was there; 0 without images."""
    moved: float = 0.0
    """Part of the time that transfers took."""
    first_token: float | None = None
    end: float | None = None

    @property
    def tpot_seconds(self) -> float | None:
        """Mean time per token after the first; None for one token and for an answer that didn't end."""
        if self.end is None or self.first_token is None or self.shape.answer_tokens < 2:
            return None
        return (self.end - self.first_token) / (self.shape.answer_tokens - 1)


@dataclass(frozen=True)
class Result:
    """What a simulated trial shows."""

    outcomes: Sequence[Outcome]
    seconds: float
    """From the first arrival to the end of the last answer."""
    busy: Mapping[Stage, float]
    """Share of all devices' time that each stage used."""
    preemptions: int
    events: int


def tokens_of(request: Shape, model: ModelShape) -> int:
    """Return the length of a request, prompt and answer together."""
    images = sum(model.tokens_of(height, width) for width, height in request.images)
    return request.prompt_tokens + images + request.answer_tokens
