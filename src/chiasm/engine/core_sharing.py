"""Cores that several instances share: each thread that computes takes an even part of them, product by product.

A lone request gets all cores, and on a busy machine each thread computes on one, which is what both cases want: one operator on
two cores takes more than half of its time on one. The instances see each other through a small file, one slot of eight bytes
for each compute thread. A slot holds the time at which its thread last said that it computes or has ended, and whether it can
use more than one core. A thread says so before each module and each product of its model, so a slot that was written long ago
belongs to a thread that has died and doesn't count. It has ended when it has nothing left to do: between two steps of a running
stream, or two images that wait, it keeps its cores, since others that took them would meet it there.

A thread that begins takes cores away from the others' operators, and an operator on several cores then takes a multiple of
its time: its helper waits milliseconds for a core, and it waits for its helper. So a whole layer is too long between two looks
at the others. And where two language models have computed at once, there is more than one request, and they will soon again: so
for a second no thread takes more cores than it had then. A token of a running stream must not come so late in any case, so work
that decodes counts all threads that have computed within the last second.

The file doesn't show who else wants the cores: other programs, the proxy, threads that decode images. An operator on two
cores ends with its slower half, so beside such work it takes longer than on one core, and more CPU time. The thread itself
feels that: it waits in place of computing. So one that has waited much uses fewer cores for a while (:class:`Crowding`).

All of it is a matter of speed: a thread that counts the others wrongly computes the same numbers with more or fewer threads.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from chiasm.cores import adapting
from chiasm.errors import ConfigurationError
from chiasm.ownership import other_writers

if TYPE_CHECKING:
    from torch import nn

SLOTS = 64
"""Maximum number of compute threads that share cores."""
_SLOT_BYTES = 8
_LEAST_PART, _LEAST_AT = SLOTS, SLOTS + 1
"""Where the file has the smallest part that a thread has lately had, and when."""
_FILE_BYTES = (SLOTS + 2) * _SLOT_BYTES
_LONG_AGO_NS = 5_000_000_000
LEAST_LAYER_SECONDS = 0.002
"""A layer that takes less time than this on one core is computed on one: waking the other threads would take too long. On an
idle machine, two cores make layers of 1 ms 1.2 times as fast, those of 2 ms 1.4 times, and those of 8 ms 1.7 times."""
_RECENT_NS = 1_000_000_000
"""For how long a thread that has ended counts for steady work, and the smallest part for all."""
_INTERVAL_NS = 500_000
"""Shortest time between two looks at the other threads."""
_MOST_WAITING = 0.45
"""Share of its time on several cores that a thread may wait in place of computing: two cores are then still a tenth faster
than one, as at 0.5 they are no faster. Beside a thread that keeps one of two cores busy it waits for at least half of its
time. On an idle machine it may be 0.4, because the helpers of a thread that has slept begin the first layer milliseconds
late.
"""
_JUDGED_NS = 20_000_000
"""Time on several cores after which that is judged: what the system does now and then doesn't count."""
_FIRST_PAUSE_NS, _LONGEST_PAUSE_NS = 100_000_000, 3_200_000_000
"""For how long it uses fewer cores when it has waited more. Each time in a row is twice as long."""


class CoreShare:
    """The threads that compute on some cores, as they show themselves in a file; without a file, those of this process."""

    def __init__(self, path: Path | None, cores: int) -> None:
        """Raises ConfigurationError if the file cannot be opened."""
        self.cores = cores
        self._taken: set[int] = set()
        self._lock = threading.Lock()
        self._file: int | None = None
        if path is None:
            self._memory = memoryview(bytearray(_FILE_BYTES)).cast("Q")
            return
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            if others := other_writers(os.fstat(self._file)):  # who shortens it ends the processes that have mapped it
                os.close(self._file)
                raise ConfigurationError(
                    f"The file {path}, in which instances share cores, {others}; name one in a folder of this user."
                )
            os.ftruncate(self._file, _FILE_BYTES)
            if hasattr(os, "posix_fallocate"):  # to write where memory has no room left would end the process
                os.posix_fallocate(self._file, 0, _FILE_BYTES)
            self._memory = memoryview(mmap.mmap(self._file, _FILE_BYTES)).cast("Q")
        except OSError as error:
            raise ConfigurationError(
                f"The file {path}, in which instances share cores, cannot be opened: {error}."
            ) from error
        self._forget_earlier_start()

    def _forget_earlier_start(self) -> None:
        """Forget what was shown before the machine has last started, since when its clock counts: it is as if yet to come."""
        now = time.monotonic_ns()
        for place, value in enumerate(self._memory.tolist()[:SLOTS]):
            if value >> 3 > now:
                self._memory[place] = 0
        if self._memory[_LEAST_AT] > now:
            self._memory[_LEAST_AT] = 0

    def worker(self, *, encodes: bool = False) -> Worker:
        """Return a slot for one compute thread, which encodes images or runs a language model.

        Raises ConfigurationError if there is none left.
        """
        with self._lock:
            for slot in range(SLOTS):
                if slot not in self._taken and self._lock_slot(slot):
                    self._taken.add(slot)
                    self._memory[slot] = 0  # its last owner may have died while it computed
                    return Worker(self, slot, encodes=encodes)
        raise ConfigurationError(f"More than {SLOTS} threads would share {self.cores} cores; run fewer instances.")

    def _lock_slot(self, slot: int) -> bool:
        """Take the slot among all processes. The kernel gives it back when this process ends."""
        if self._file is None:
            return True
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, slot)
        except OSError:
            return False
        return True

    def show(self, slot: int, now: int, *, alone: bool = False, ended: bool = False, encodes: bool = False) -> None:
        """Note that the thread of ``slot`` computes at ``now`` (nanoseconds), ``alone`` on one core, or that it has ended."""
        self._memory[slot] = now << 3 | encodes << 2 | ended << 1 | alone

    def part_of(self, slot: int, now: int, *, steady: bool = False) -> int:
        """Return the number of cores for the thread of ``slot``, which can use several: at least 1.

        It is no more than the even part when language models have computed at once within the last second. With ``steady``, all
        that have computed within that second count as if they did now.
        """
        shown = self._memory.tolist()[:SLOTS]
        last = (now - _LONG_AGO_NS, now - _RECENT_NS if steady else now)
        computing = [other for other, value in enumerate(shown) if other == slot or value >> 3 > last[value >> 1 & 1]]
        several = [other for other in computing if other == slot or not shown[other] & 1]
        part, rest = divmod(self.cores - (len(computing) - len(several)), len(several))
        if not steady:
            models = sum(not shown[other] >> 2 & 1 for other in computing)
            if (least := self._least_part(part if models > 1 else self.cores, now)) < part:
                return max(1, least)
        return max(1, part + (several.index(slot) < rest))

    def _least_part(self, part: int, now: int) -> int:
        """Return the smallest part within the last second, of which ``part`` is the newest."""
        if part <= self._memory[_LEAST_PART] or self._memory[_LEAST_AT] < now - _RECENT_NS:
            self._memory[_LEAST_PART], self._memory[_LEAST_AT] = max(0, part), now
        return self._memory[_LEAST_PART]


class Crowding:
    """How many cores a thread should use at most, by how much it has waited on several. Instants are in nanoseconds."""

    def __init__(self) -> None:
        self._most = 1
        self._until = 0
        self._pause = 0
        self._passed = 0
        self._computed = 0

    def most(self, now: int) -> int | None:
        """Return the number; None: any."""
        return self._most if now < self._until else None

    def note(self, threads: int, passed: int, computed: int, now: int) -> None:
        """Note for how long the thread has computed with ``threads``, of the time that has passed until ``now``."""
        if threads < 2:
            return
        self._passed += passed
        self._computed += computed
        if self._passed < _JUDGED_NS:
            return
        waiting = 1 - self._computed / self._passed
        self._passed = self._computed = 0
        if waiting <= _MOST_WAITING:
            self._pause //= 2
            return
        self._pause = min(_LONGEST_PAUSE_NS, max(_FIRST_PAUSE_NS, 2 * self._pause))
        self._most, self._until = threads // 2, now + self._pause


class Worker:
    """One compute thread. Methods are called in that thread, except where they say otherwise."""

    def __init__(self, share: CoreShare, slot: int, *, encodes: bool) -> None:
        self._share = share
        self._slot = slot
        self._encodes = encodes
        self._layers = 1
        self._computing = self._steady = False
        self._alone = False
        self._threads = 0
        self._looked_at = 0
        self._computed_at_look = 0
        self._crowding = Crowding()

    @contextmanager
    def computing(self, seconds: float = math.inf, *, steady: bool = False) -> Iterator[None]:
        """A block that computes; the thread's intra-op threads follow its part of the cores, which it keeps until it rests.

        ``seconds`` is about what the work takes on one core. ``steady`` work must not be disturbed by threads that begin.
        """
        self._computing, self._steady = True, steady
        self._alone = seconds / self._layers < LEAST_LAYER_SECONDS
        self._looked_at = self._threads = 0  # torch keeps the number by thread, and another may have computed last
        self.adapt()
        try:
            with adapting(self.adapt):
                yield
        finally:
            self._computing = False
            self._note_waiting(time.monotonic_ns())

    def rest(self) -> None:
        """Leave the cores to others, since nothing is left to compute for now. Any thread."""
        self._share.show(self._slot, time.monotonic_ns(), alone=self._alone, ended=True, encodes=self._encodes)

    def adapt(self) -> None:
        """Use as many intra-op threads as this thread's part of the cores has.

        Called before each layer and product. Costs microseconds twice in a millisecond, and next to nothing else.
        """
        now = time.monotonic_ns()
        if not self._computing or now - self._looked_at < _INTERVAL_NS:
            return
        self._note_waiting(now)
        self._looked_at = now
        most = self._crowding.most(now)
        alone = self._alone or most == 1
        self._share.show(self._slot, now, alone=alone, encodes=self._encodes)
        threads = 1 if alone else self._share.part_of(self._slot, now, steady=self._steady)
        if most is not None:
            threads = min(threads, most)
        if threads != self._threads:
            torch.set_num_threads(threads)
            self._threads = threads

    def _note_waiting(self, now: int) -> None:
        """Note how much of the time since the last look this thread has waited for its helpers or for a core."""
        computed = time.thread_time_ns()
        self._crowding.note(self._threads, now - self._looked_at, computed - self._computed_at_look, now)
        self._computed_at_look = computed

    def follow(self, module: nn.Module) -> None:
        """Adapt before each module of a model: also what comes before its layers may take long."""
        self._layers = max(1, len(_layers(module)))
        for part in module.modules():
            part.register_forward_pre_hook(lambda *_: self.adapt())


def _layers(module: nn.Module) -> list[nn.Module]:
    """Return the members of all lists of modules that are in no other list: the layers, but not the experts in them."""
    from torch import nn

    found: list[nn.Module] = []
    for child in module.children():
        found += list(child) if isinstance(child, nn.ModuleList) else _layers(child)
    return found
