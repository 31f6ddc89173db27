"""The order in which sequences that wait to run take places, beside those that run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from chiasm.due import BEFORE_ALL_NEW
from chiasm.engine.late_items import LateItems
from chiasm.engine.sequence import Sequence
from chiasm.engine.shares import by_turns


class Place(NamedTuple):
    """Where a sequence stands among those that have tokens to prefill: the lowest goes first."""

    will_stall: bool
    """Prompts that can run to their end go before those that would stop at a missing embedding."""
    due: float
    arrival: int


def place_of(sequence: Sequence, items: LateItems) -> Place:
    """Return where the sequence stands by itself."""
    return Place(items.will_stall(sequence), *sequence.order)


def in_turn(
    waiting: Iterable[Sequence], items: LateItems, placed: Iterable[Sequence]
) -> list[tuple[Place, bool, Sequence]]:
    """Return the sequences that wait, first first, each after its place and True.

    Where one of them would stand by itself, the one stands whose key has the turn; ``placed`` have places already. An answer
    that was cut off on another instance needs no turn: it goes before all new ones.
    """
    own = sorted((place_of(sequence, items), sequence) for sequence in waiting)
    sequences = [sequence for _, sequence in own]
    if len({sequence.key for sequence in sequences}) > 1:
        resumed = [sequence for sequence in sequences if sequence.due == BEFORE_ALL_NEW]
        new = [sequence for sequence in sequences if sequence.due != BEFORE_ALL_NEW]
        held = Counter(sequence.key for sequence in (*placed, *resumed))
        stalls = {sequence.sequence_id: place.will_stall for place, sequence in own}
        sequences = sorted([*resumed, *by_turns(new, held)], key=lambda sequence: stalls[sequence.sequence_id])
    return [(place, True, sequence) for (place, _), sequence in zip(own, sequences, strict=True)]
