"""The interface of a measurement, and what it is given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from chiasm.bench.client import Client
from chiasm.bench.outcome import Outcome
from chiasm.launch.config import EngineKind

SERVED_NAME = "bench"
"""What every topology calls its model, whatever the checkpoint."""


@dataclass
class Bench:
    """What all measurements of a run share."""

    model: str
    """A checkpoint's folder, the name of a shipped one, or a hub name."""
    scratch: Path
    """A folder for synthetic checkpoints, which is removed after the run."""
    client: Client
    seed: int = 0
    quick: bool = False
    """Few samples: whether it runs is the question, not how fast."""
    repeat: int | None = None
    """Samples of each measurement, in place of its own number."""
    step: Callable[[str], None] = field(default=lambda text: None)
    """Tell what is done now."""
    total: Callable[[int], None] = field(default=lambda total: None)
    """Tell how many samples there will be; progress begins anew."""
    advance: Callable[[], None] = field(default=lambda: None)
    """Tell that one more is done."""

    def samples(self, number: int, *, quick: int) -> int:
        """How many to take, where the measurement would take ``number``, or ``quick`` in a hurry."""
        if self.repeat is not None:
            return self.repeat
        return quick if self.quick else number


class Measurement(ABC):
    """One question, and how it is answered. A new one is made for every run."""

    name: ClassVar[str]
    """As the command line has it."""
    purpose: ClassVar[str]
    """The question, in one line."""
    target: ClassVar[str]
    """What is to be reached, in one line."""
    engine: ClassVar[EngineKind] = EngineKind.CHIASM
    """What runs in the instances that it is about; what ``--engine`` chooses by."""

    @abstractmethod
    async def run(self, bench: Bench) -> Outcome:
        """Start what is needed, measure, and end it all, also when cancelled. Raises ChiasmError."""
