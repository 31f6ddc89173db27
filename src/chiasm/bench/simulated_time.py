"""The clock of a simulation: what is going to happen, in order of time."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable


class SimulatedTime:
    """What happens at the same time happens in the order in which it was announced."""

    def __init__(self) -> None:
        self.now = 0.0
        """Seconds from the beginning."""
        self._pending: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def at(self, when: float, event: Callable[[], None]) -> None:
        """Call ``event`` at a time, or now if that has passed."""
        heapq.heappush(self._pending, (max(when, self.now), next(self._numbers), event))

    def step(self) -> bool:
        """Let the next thing happen; return whether there was one."""
        if not self._pending:
            return False
        self.now, _, event = heapq.heappop(self._pending)
        event()
        return True

    def run(self) -> None:
        """Let everything happen."""
        while self.step():
            pass
