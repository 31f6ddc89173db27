"""Who gives up blocks when they are short, and to whom."""

from __future__ import annotations

from collections.abc import Sequence as AbstractSequence

from chiasm.engine.late_items import LateItems
from chiasm.engine.sequence import Sequence
from chiasm.engine.step import Step


class Preemption:
    """Chooses among the sequences that run, which are in order of due. Those that the step has scheduled keep their blocks."""

    def __init__(self, items: LateItems, *, recomputes_items: bool) -> None:
        """Without ``recomputes_items``, sequences with items are not chosen, since they could not be computed again."""
        self._items = items
        self._recomputes_items = recomputes_items

    def victim(self, sequence: Sequence, running: AbstractSequence[Sequence], step: Step) -> Sequence | None:
        """Return whom to preempt: one that gives way because it waits, else the last that comes after ``sequence``.

        One that is sure to wait for room in the encoder cache takes nothing from one that can run to its end, which would take
        it back meanwhile, and so on without end. It gives that one its blocks, if nobody else can.
        """
        waiting = self.waiting_victim(sequence, running, step)
        if waiting is not None or self._items.will_stall(sequence):
            return waiting
        others = self._preemptible(sequence, running, step)
        later = [other for other in others if other.order > sequence.order]
        if self._items.exceeds_cache(sequence):
            later = [other for other in later if not self._items.can_finish(other)]
        elif self._items.can_finish(sequence):
            later += [other for other in others if self._items.exceeds_cache(other)]
        return next(iter(later), None)

    def waiting_victim(self, sequence: Sequence, running: AbstractSequence[Sequence], step: Step) -> Sequence | None:
        """Return the last that waits for an embedding: of all, if ``sequence`` can run to its end, else of those after it.

        So prompts that wait don't take blocks from each other in turn.
        """
        others = self._preemptible(sequence, running, step)
        if not self._items.can_finish(sequence):
            others = [other for other in others if other.order > sequence.order]
        return next((other for other in others if self._items.will_stall(other)), None)

    def _preemptible(self, sequence: Sequence, running: AbstractSequence[Sequence], step: Step) -> list[Sequence]:
        """Return the other sequences that could give up blocks, the last in order first."""
        scheduled = {part.sequence.sequence_id for part in step.scheduled}
        others = [
            other
            for other in reversed(running)
            if other is not sequence and other.sequence_id not in scheduled and other.block_ids
        ]
        if not self._recomputes_items:
            others = [other for other in others if not other.items]
        return others
