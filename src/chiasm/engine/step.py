"""What runs in one step of the engine: the scheduler plans it, the model runner computes it."""

from __future__ import annotations

from dataclasses import dataclass, field

from chiasm.engine.sequence import Sequence


@dataclass(frozen=True)
class ScheduledSequence:
    """Tokens ``[start, start + num_tokens)`` of a sequence; with ``samples``, the last of them yields a new token."""

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


@dataclass
class Step:
    """One step: decodes first, then prefill chunks."""

    decodes: list[ScheduledSequence] = field(default_factory=list)
    prefills: list[ScheduledSequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    load: list[Sequence] = field(default_factory=list)
    """Sequences that have just received blocks for KV from another instance."""
    set_aside: list[tuple[Sequence, list[int]]] = field(default_factory=list)
    """Preempted sequences that can't be computed again, with the blocks that have their first ``num_remote`` tokens."""
    put_back: list[Sequence] = field(default_factory=list)
    """Sequences that have just received blocks for KV that was set aside."""

    @property
    def scheduled(self) -> list[ScheduledSequence]:
        return self.decodes + self.prefills

    @property
    def num_rows(self) -> int:
        return sum(part.num_tokens for part in self.scheduled)

    def drop_finished(self) -> None:
        """Take out the sequences that have ended since the step was planned."""
        self.decodes = [part for part in self.decodes if not part.sequence.finished]
        self.prefills = [part for part in self.prefills if not part.sequence.finished]
