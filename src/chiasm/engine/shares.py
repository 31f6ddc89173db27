"""How places are shared: each request has a bounded share of them, and keys take turns.

A request takes one place whenever one is free, and more of them only while more are free than it has (dynamic thresholds,
Choudhury and Hahne 1998): so a request alone takes half, two take a third each, and there is room for whoever comes next.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

KEY_WEIGHT = 3
"""A key takes more places while it has less than this times the free ones: alone it takes three quarters."""


class Keyed(Protocol):
    """What takes places."""

    @property
    def key(self) -> str: ...


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
