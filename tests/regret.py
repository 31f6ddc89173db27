"""What choices lose against the best ones in hindsight, in a simulation in which they can be forced."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

_Place = TypeVar("_Place")


def regret(
    first_tokens: Callable[[int, dict[int, _Place]], Sequence[float]],
    places: Sequence[_Place],
    choices: Collection[_Place],
    *,
    warm_up: int,
) -> float:
    """Return what requests lose in all, as a share of their first tokens where each goes to the place that is best for it.

    ``places`` are those that were chosen. Each request after the first ``warm_up`` is given to every one of ``choices`` in
    turn, while those before it stay where they are. Those after it are left out: what comes next can't be known.
    ``first_tokens(count, forced)`` returns the seconds to the first token of the first ``count`` requests.
    """
    lost = best = 0.0
    for number in range(warm_up, len(places)):
        before = dict(enumerate(places[:number]))
        outcomes = {place: first_tokens(number + 1, before | {number: place})[number] for place in choices}
        best += min(outcomes.values())
        lost += outcomes[places[number]] - min(outcomes.values())
    return lost / best
