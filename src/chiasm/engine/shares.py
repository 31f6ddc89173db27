"""How places are shared: each request has a bounded share of them, and keys take turns.

A request takes one place whenever one is free, and more of them only while more are free than it has (dynamic thresholds,
Choudhury and Hahne 1998): so a request alone takes half, two take a third each, and there is room for whoever comes next.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

from chiasm.errors import Code, OverloadedError

KEY_WEIGHT = 3
"""A key takes more places while it has less than this times the free ones: alone it takes three quarters."""


class Keyed(Protocol):
    """What takes places."""

    @property
    def key(self) -> str:
        """Names the client's key; empty if there are none."""

    @property
    def part_of(self) -> str:
        """Names the client's request."""


_K = TypeVar("_K", bound=Keyed)


def may_take(held: int, free: int, *, weight: int = 1) -> bool:
    """Return whether one that has ``held`` places may take another, of which ``free`` are left."""
    return held < weight * free


def largest_share(places: int) -> int:
    """Return how many of so many free places one request can take."""
    return (places + 1) // 2


def by_turns(waiting: Sequence[_K], held: Mapping[str, int]) -> list[_K]:
    """Return what waits in the order in which it takes places: next is the key with the fewest, which are ``held`` by key.

    Within a key, and among keys with equally many, the order stays.
    """
    taken = Counter(held)
    turns: list[int] = []
    for one in waiting:
        turns.append(taken[one.key])
        taken[one.key] += 1
    return [one for _, one in sorted(zip(turns, waiting, strict=True), key=lambda pair: pair[0])]


def check_queue(queued: Sequence[Keyed], coming: Sequence[Keyed], most: int) -> None:
    """Raise OverloadedError if what comes, of one request, finds no room beside what is queued, or takes too much of it.

    ``most`` is how many can be queued.
    """
    free = most - len(queued)
    if free < len(coming):
        raise OverloadedError(
            f"{len(queued)} requests are queued here and {most} is the limit; try again later.",
            code=Code.TOO_MANY_REQUESTS,
        )
    first, others = coming[0], len(coming) - 1
    of_request = sum(1 for one in queued if one.part_of == first.part_of)
    of_key = sum(1 for one in queued if one.key == first.key) if first.key else 0
    if not may_take(of_request + others, free - others):
        raise OverloadedError(
            f"{of_request} answers of the request are queued here, and some of the room for {free} more is kept for "
            "others; try again later, or with fewer prompts and a lower n.",
            code=Code.TOO_MANY_REQUESTS,
        )
    if first.key and not may_take(of_key + others, free - others, weight=KEY_WEIGHT):
        raise OverloadedError(
            f"{of_key} requests of this API key are queued here, and the room that is left is for others; try again later.",
            code=Code.TOO_MANY_REQUESTS,
        )
