"""How long a measurement may take, and what each of its trials gets of that."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

Clock = Callable[[], float]
"""Seconds from any time on."""


class Budget:
    """Divides the time of a measurement among its parts: what one part leaves, the later ones get."""

    def __init__(self, seconds: float, clock: Clock = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self._began = clock()

    @property
    def left(self) -> float:
        """Seconds until the time is up; 0 afterwards."""
        return max(0.0, self._began + self.seconds - self._clock())

    def part(self, parts: int, rounds: int, tail_seconds: float) -> Part:
        """Begin one of ``parts`` parts that are left; it has so many rounds.

        ``tail_seconds`` is how long a trial may take after it has sent its last request, until trials have shown it.
        """
        return Part(self._clock() + self.left / parts, rounds, self._clock, [tail_seconds])


@dataclass
class Part:
    """The time of one part, which is made of rounds of trials."""

    until: float
    """By ``clock``."""
    rounds: int
    """Those that are left."""
    clock: Clock
    tails: list[float]

    def sending_seconds(self, trials: int) -> float:
        """Return how long each trial of the next round may send; not above 0 if there is no time for it."""
        return (self.until - self.clock()) / self.rounds / trials - self._tail

    def has_room(self, trials: int, sending_seconds: float) -> bool:
        """Tell whether a round of trials that send so long ends in time."""
        return self.clock() + trials * (sending_seconds + self._tail) <= self.until

    def took(self, seconds: float, sending_seconds: float) -> None:
        """Take note of how long a trial took."""
        self.tails.append(max(0.0, seconds - sending_seconds))

    def end_round(self) -> None:
        self.rounds = max(1, self.rounds - 1)

    @property
    def _tail(self) -> float:
        """The mean of the trials so far; what was assumed at first counts as one of them."""
        return sum(self.tails) / len(self.tails)
