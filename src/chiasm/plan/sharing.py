"""How the work on one device shares it: each piece has a speed that depends on what else runs there.

CPU: a thread that computes takes an even part of the cores, and at least one, as ``engine/core_sharing.py`` has it; when
there are more threads than cores, the kernel divides them by weight. What serves requests shows itself to nobody, so one thread
of work on several cores may have to share its core with it, and the work is as slow as that thread.

GPU: one core, so processes take turns, evenly; inside one process, an encoder's stream of lower priority gives way to the
engine's steps.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

NORMAL_WEIGHT = 1024.0
NICE_5_WEIGHT = 335.0
"""The kernel's weights of nice 0 and 5 (``sched_prio_to_weight``)."""
STREAM_WEIGHT = NORMAL_WEIGHT / 4
"""Of a CUDA stream of lower priority beside one of higher priority. An assumption: it gets what steps leave, a fifth."""
_DONE_SECONDS = 1e-9
"""Work that would end within this time has ended: sums of floats never meet exactly."""


class Stage(enum.StrEnum):
    """What a device is used for. A step that prefills and decodes counts as prefill."""

    ENCODE = "encode"
    PREFILL = "prefill"
    DECODE = "decode"
    SERVE = "serve"
    """HTTP, the proxy, tokenizing, sending tokens."""


@dataclass(eq=False)
class Work:
    """A piece of work, from its start to its end on one device."""

    seconds: Callable[[int], float]
    """How long it takes with that many threads, undisturbed."""
    ended: Callable[[], None]
    """Called when it is done."""
    stage: Stage
    weight: float = NORMAL_WEIGHT
    max_threads: int = 1
    adapts: bool = True
    """Whether it runs on its part of the cores; otherwise always with ``max_threads``."""
    left: float = field(default=1.0, init=False)
    """The part that is still to be done."""
    speed: float = field(default=0.0, init=False)
    """The part that is done in a second, now."""
    share: float = field(default=0.0, init=False)
    """The cores that it has now."""


class SharedDevice:
    """A GPU, or cores, and the work that runs there. Knows no clock: the simulation says what time it is."""

    def __init__(self, cores: int = 1, *, busy_factor: float = 1.0) -> None:
        self.cores = cores
        self.busy_factor = busy_factor
        self.working: list[Work] = []
        self.busy_seconds = dict.fromkeys(Stage, 0.0)
        """Time in which all of the device was in use, by what for; half of it in use counts half."""
        self._now = 0.0
        self._changed = False
        """Whether the speeds are still those of other work."""

    def start(self, work: Work, now: float) -> None:
        """Begin a piece of work, after :meth:`advance` to the same time."""
        assert now == self._now
        self.working.append(work)
        self._changed = True

    def advance(self, now: float) -> list[Work]:
        """Let time pass until ``now``; return the work that has ended, which is gone from the device."""
        passed = now - self._now
        self._now = now
        if not self.working or (not passed and not self._changed):
            return []
        self._set_speeds()
        ended: list[Work] = []
        for work in self.working:
            work.left -= passed * work.speed
            self.busy_seconds[work.stage] += passed * work.share / self.cores
            if work.left <= _DONE_SECONDS * work.speed:
                ended.append(work)
        if ended:
            self.working = [work for work in self.working if work not in ended]
            self._changed = True
        return ended

    def next_end(self) -> float | None:
        """Return when the first of the work will end if nothing begins before; None if there is none."""
        if not self.working:
            return None
        self._set_speeds()
        return self._now + min([max(work.left, 0.0) / work.speed for work in self.working])

    def _set_speeds(self) -> None:
        if not self._changed:
            return
        self._changed = False
        computing = [work for work in self.working if work.stage is not Stage.SERVE]
        part, rest = divmod(self.cores, max(1, len(computing)))
        most = {work: max(1, part + (place < rest)) for place, work in enumerate(computing)}
        threads = [
            min(work.max_threads, most.get(work, 1)) if work.adapts else work.max_threads for work in self.working
        ]
        slowest = 1 / -(-sum(threads) // self.cores)
        shares = _shares(self.cores, [work.weight for work in self.working], threads)
        busy = sum(shares)
        for work, count, share in zip(self.working, threads, shares, strict=True):
            others = (busy - share) / (self.cores - count) if self.cores > count else 0.0
            slower = 1 + (self.busy_factor - 1) * min(1.0, others)
            of_thread = share / count if count == 1 else min(share / count, slowest)
            work.share = share
            work.speed = of_thread / (max(work.seconds(count), 1e-9) * slower)


def _shares(cores: int, weights: Sequence[float], threads: Sequence[int]) -> list[float]:
    """Return how many cores each of the work has: one for each thread if there are enough, else divided by weight.

    A thread uses at most one core, and what it leaves is divided among the others.
    """
    if sum(threads) <= cores:
        return [float(count) for count in threads]
    shares = [0.0] * len(weights)
    pending = list(range(len(weights)))
    room = float(cores)
    while pending:
        total = sum(weights[index] * threads[index] for index in pending)
        full = [index for index in pending if room * weights[index] / total >= 1]
        if not full:
            for index in pending:
                shares[index] = room * weights[index] * threads[index] / total
            break
        for index in full:
            shares[index] = float(threads[index])
            room -= threads[index]
        pending = [index for index in pending if index not in full]
    return shares
