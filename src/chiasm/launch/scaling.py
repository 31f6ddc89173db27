"""Runs as many encoders as the proxy desires, within a range: starts them at once, and drains them one at a time.

The proxy counts (``chiasm_fleet_desired_instances``), and finds the encoders in a file that it watches. One that is to end is
taken from the file. When the proxy has given it up, because no call is under way, the process is asked to end, which it does
when others have fetched what they need from it.
"""

from __future__ import annotations

import enum
import json
import math
import os
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from chiasm.launch.child import Child, ProcessState
from chiasm.launch.plan import ProcessPlan

LOOK_SECONDS = 0.5
"""Between two questions to the proxy."""
STEP_SECONDS = 60.0
"""From one encoder fewer to the next. The proxy has waited for a calm while before, but a new one has to learn the load."""
FIRST_PAUSE_SECONDS = 5.0
LONGEST_PAUSE_SECONDS = 300.0
"""After a start that failed, before the next one; it doubles each time."""
_NOTHING = 1e-6
_KILL_SECONDS = 10.0
"""Time beyond that of its calls, after which an encoder that should have ended is killed."""
_CLOSE_SECONDS = 1.0


class EncoderNumber:
    """How many encoders there should be, and whether one may be started. State only: no clock and no I/O."""

    def __init__(self, least: int, most: int, step_seconds: float = STEP_SECONDS) -> None:
        """There is one fewer whenever fewer have been desired for ``step_seconds``."""
        self.target = least
        self._least = least
        self._most = most
        self._step_seconds = step_seconds
        self._enough_since: float | None = None
        """Since when fewer than the target are desired."""
        self._pause_seconds = 0.0
        self._paused_until = 0.0

    def follow(self, desired: float, now: float) -> int:
        """Take what the proxy desires, and return the number that there should be: more at once, fewer one at a time."""
        wanted = min(max(math.ceil(desired - _NOTHING), self._least), self._most)
        if wanted >= self.target:
            self.target, self._enough_since = wanted, None
        elif self._enough_since is None:
            self._enough_since = now
        elif now - self._enough_since >= self._step_seconds:
            self.target, self._enough_since = self.target - 1, now
        return self.target

    def may_start(self, now: float) -> bool:
        """Return whether no start has failed just now."""
        return now >= self._paused_until

    def note_failure(self, now: float) -> float:
        """Note that a start has failed; return the seconds until the next one. Starts that fail together count as one."""
        if self.may_start(now):
            self._pause_seconds = min(2 * self._pause_seconds or FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS)
            self._paused_until = now + self._pause_seconds
        return self._paused_until - now

    def note_success(self) -> None:
        """Note that an encoder is ready."""
        self._pause_seconds = 0.0


class ProxySays(NamedTuple):
    """What the proxy says of encoders at one moment."""

    desired: float | None
    """How many there should be; None if it doesn't answer."""
    known: Collection[str]
    """The URLs of the instances that it knows; empty if it wasn't asked for them, or doesn't answer."""


class _Stage(enum.Enum):
    IDLE = enum.auto()
    """There is no process."""
    RUNNING = enum.auto()
    """It starts, or serves, or is started again after its death."""
    LEAVING = enum.auto()
    """The proxy is to give it no more images, and calls may be under way."""
    ENDING = enum.auto()
    """It has been asked to end."""


@dataclass(eq=False)
class _Encoder:
    """One encoder of the range, whether it runs or not."""

    plan: ProcessPlan
    is_spare: bool
    """Whether it runs only while it is needed."""
    stage: _Stage = _Stage.IDLE
    child: Child | None = None
    was_ready: bool = False
    failures: int = 0
    """Starts in a row that have failed."""
    ends_by: float = 0.0


class Scaling:
    """The encoders of one deployment that come and go, in a thread of its own."""

    def __init__(
        self,
        encoders: Sequence[ProcessPlan],
        number: EncoderNumber,
        listed_in: Path,
        *,
        end_seconds: float,
        begin: Callable[[ProcessPlan], Child],
        forget: Callable[[ProcessPlan], None],
        ask: Callable[[bool], ProxySays],
        say: Callable[[str], None],
    ) -> None:
        """``encoders`` are all that may run, in the order in which they start, and ``listed_in`` where the proxy finds them.

        One that is asked to end has ``end_seconds`` for it. ``begin`` starts a process; ``forget`` is called when one has ended
        and is not to be started again for now. ``ask`` asks the proxy, also for the instances that it knows if its argument is
        true, and ``say`` tells the operator. They are called by ``start``, and then in this object's thread until ``close``.
        """
        self._encoders = [_Encoder(plan, index >= number.target) for index, plan in enumerate(encoders)]
        self._number = number
        self._listed_in = listed_in
        self._listed: list[_Encoder] | None = None
        """What the file lists."""
        self._is_behind = False
        """Whether the file couldn't be written."""
        self._end_seconds = end_seconds
        self._begin_process = begin
        self._forget = forget
        self._ask = ask
        self._say = say
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._live, name="chiasm-scaling", daemon=True)

    def start(self) -> None:
        """Start the least number of encoders, and follow the proxy from now on. The proxy is to be started later."""
        self.look(ProxySays(None, ()), time.monotonic())
        self._thread.start()

    def close(self) -> None:
        """Start and end nothing from now on; idempotent."""
        self._over.set()
        with self._lock:  # no look is under way
            pass
        if self._thread.is_alive():
            self._thread.join(_CLOSE_SECONDS)

    def _live(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            self.follow(time.monotonic)

    def follow(self, clock: Callable[[], float]) -> None:
        """Ask the proxy, and do as it says, unless all is over.

        Which instances it knows matters only while one is to leave it.
        """
        says = self._ask(bool(self._in(_Stage.LEAVING)))
        with self._lock:
            if not self._over.is_set():
                self.look(says, clock())

    def look(self, says: ProxySays, now: float) -> None:
        """See what has become of the encoders, and start or end some as the proxy says; the first time, start the least."""
        for encoder in list(self._encoders):
            self._note(encoder, now)
        if says.desired is not None:
            self._number.follow(says.desired, now)
        self._adjust(now)
        for encoder in self._encoders:
            self._end(encoder, says.known, now)
        self._list()

    # ---- one encoder -----------------------------------------------------------------------------------------------------

    def _note(self, encoder: _Encoder, now: float) -> None:
        """Note what has become of an encoder."""
        child = encoder.child
        if child is None:
            return
        if child.join(0.0):
            if encoder.stage is _Stage.RUNNING:
                self._note_failure(encoder, child, now)
            else:
                self._discard(encoder)
        elif child.state is ProcessState.READY and not encoder.was_ready:
            encoder.was_ready, encoder.failures = True, 0
            self._number.note_success()

    def _end(self, encoder: _Encoder, known: Collection[str], now: float) -> None:
        """Ask an encoder that drains to end, if the proxy doesn't use it; kill one that hasn't ended in time."""
        child = encoder.child
        if child is None:
            return
        if encoder.stage is _Stage.LEAVING:
            if child.state is not ProcessState.READY or (known and encoder.plan.address.url not in known):
                child.end()
                encoder.stage, encoder.ends_by = _Stage.ENDING, now + self._end_seconds + _KILL_SECONDS
        elif encoder.stage is _Stage.ENDING and now >= encoder.ends_by:
            child.kill()

    def _note_failure(self, encoder: _Encoder, child: Child, now: float) -> None:
        """Note that an encoder can't be started."""
        if not encoder.is_spare:  # the deployment ends, or goes on without it
            self._encoders.remove(encoder)
            return
        encoder.failures += 1
        seconds = self._number.note_failure(now)
        why = child.failure.message if child.failure is not None else "It has ended."
        self._say(f"{encoder.plan.name} can't be started; the next start is in {seconds:.0f} s. {why}")
        self._discard(encoder)

    def _begin(self, encoder: _Encoder) -> None:
        encoder.child = self._begin_process(encoder.plan)
        encoder.stage, encoder.was_ready = _Stage.RUNNING, False

    def _discard(self, encoder: _Encoder) -> None:
        self._forget(encoder.plan)
        encoder.stage, encoder.child = _Stage.IDLE, None

    # ---- their number ----------------------------------------------------------------------------------------------------

    def _in(self, stage: _Stage) -> list[_Encoder]:
        return [one for one in self._encoders if one.stage is stage]

    def _adjust(self, now: float) -> None:
        """Start encoders that are missing, or let those go that aren't needed."""
        running, target = self._in(_Stage.RUNNING), self._number.target
        for encoder in running[target:]:
            self._say(f"encoders needed: {target}; {encoder.plan.name} drains")
            encoder.stage = _Stage.LEAVING
        missing = target - len(running)
        if missing > 0 and (leaving := self._in(_Stage.LEAVING)[:missing]):
            self._say(f"encoders needed: {target}; {_names(leaving)} won't drain")
            for encoder in leaving:
                encoder.stage = _Stage.RUNNING
            missing -= len(leaving)
        if missing > 0 and self._number.may_start(now):
            idle = sorted(self._in(_Stage.IDLE), key=lambda one: one.failures)[:missing]
            if any(one.is_spare for one in idle):
                self._say(f"encoders needed: {target}; starting {_names(idle)}")
            for encoder in idle:
                self._begin(encoder)

    def _list(self) -> None:
        """Tell the proxy which encoders there are, unless it knows."""
        running = self._in(_Stage.RUNNING)
        if running == self._listed:
            return
        listed = [{"url": one.plan.address.url, "role": str(one.plan.role)} for one in running]
        new = self._listed_in.with_suffix(".new")
        try:
            new.write_text(json.dumps(listed))
            os.replace(new, self._listed_in)
        except OSError as error:  # the proxy keeps what it knows, and the next look tells it
            if not self._is_behind:
                self._say(f"{self._listed_in} can't be written, so the proxy doesn't hear of changes: {error.strerror}")
            self._is_behind = True
        else:
            self._listed, self._is_behind = running, False


def _names(encoders: Sequence[_Encoder]) -> str:
    return ", ".join(one.plan.name for one in encoders)
