"""The encoder of the simulation: one image is prepared while another is encoded."""

from __future__ import annotations

import itertools
from bisect import insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from chiasm.plan.costs import CostModel
from chiasm.plan.sharing import Stage, Work


@dataclass(eq=False)
class QueuedImage:
    """An image that is to be encoded."""

    identifier: str
    height: int
    width: int
    done: Callable[[float], None]
    """Called when it is encoded, with the seconds that preparing and encoding took."""
    due: float = 0.0
    """Those that are due earlier go first, and equals in order of arrival."""
    number: int = 0


class Encoder:
    """An encoder instance, or the one inside an aggregated instance. Knows no clock: ``begin`` starts work on its device.

    ``prepare`` starts the work of one CPU core: on the encoder's own cores, or for a GPU on those of its host.
    """

    def __init__(
        self,
        costs: CostModel,
        *,
        threads: int,
        weight: float,
        adapts: bool,
        clock: Callable[[], float],
        prepare: Callable[[Work], None],
        begin: Callable[[Work], None],
    ) -> None:
        self._costs = costs
        self._threads = threads
        self._weight = weight
        self._adapts = adapts
        self._clock = clock
        self._prepare = prepare
        self._begin = begin
        self._numbers = itertools.count()
        self._unprepared: list[QueuedImage] = []
        self._prepared: deque[tuple[QueuedImage, float]] = deque()
        self._preparing: QueuedImage | None = None
        self._encoding: QueuedImage | None = None

    def add(self, image: QueuedImage) -> None:
        """Queue an image."""
        image.number = next(self._numbers)
        insort(self._unprepared, image, key=lambda one: (one.due, one.number))
        self._next()

    def drop(self, identifier: str) -> bool:
        """Forget an image that nobody needs any more; return False if it is being computed already."""
        waiting = [one for one in self._unprepared if one.identifier == identifier]
        for one in waiting:
            self._unprepared.remove(one)
        return bool(waiting)

    def _next(self) -> None:
        if self._preparing is None and self._unprepared:
            self._start_preparing(self._unprepared.pop(0))
        if self._encoding is None and self._prepared:
            self._start_encoding(*self._prepared.popleft())

    def _start_preparing(self, image: QueuedImage) -> None:
        self._preparing = image
        started = self._clock()
        seconds = self._costs.prepare_seconds(image.height, image.width)

        def ended() -> None:
            self._preparing = None
            self._prepared.append((image, self._clock() - started))
            self._next()

        self._prepare(Work(lambda threads: seconds, ended, Stage.ENCODE, self._weight))

    def _start_encoding(self, image: QueuedImage, prepare_seconds: float) -> None:
        self._encoding = image
        started = self._clock()

        def ended() -> None:
            self._encoding = None
            image.done(prepare_seconds + self._clock() - started)
            self._next()

        def seconds(threads: int) -> float:
            return self._costs.encode_seconds(image.height, image.width, threads)

        self._begin(Work(seconds, ended, Stage.ENCODE, self._weight, self._threads, self._adapts))
