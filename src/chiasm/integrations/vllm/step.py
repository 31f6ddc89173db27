"""What passes between the two halves: one message to the workers with each step, and one back."""

from __future__ import annotations

from dataclasses import dataclass, field

from chiasm.ec_transfer import ECConnectorMetadata


@dataclass(frozen=True)
class StepMetadata:
    """From the scheduler to the workers.

    ``loads`` is chiasm's own metadata, with the pins of what is to be loaded. ``expected`` names all embeddings that vLLM
    counts on having been loaded in this step, with their shapes. ``publish`` are those in memory that the store has lost.
    ``counters`` is where the first worker keeps its counters.
    """

    step: int
    loads: ECConnectorMetadata
    expected: dict[str, tuple[int, int]] = field(default_factory=dict)
    publish: tuple[str, ...] = ()
    counters: str = ""


@dataclass(frozen=True)
class StepReport:
    """From the workers to the scheduler: step ``step`` has been loaded, but for ``failed``, which are zeros now."""

    step: int
    failed: frozenset[str] = frozenset()

    def aggregate(self, other: StepReport) -> StepReport:
        """Of several ranks: what failed anywhere has failed."""
        return StepReport(min(self.step, other.step), self.failed | other.failed)
