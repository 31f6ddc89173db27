"""Runs as many encoders as the proxy desires, within a range: starts them at once, and drains them one at a time.

The proxy counts (``chiasm_fleet_desired_instances``), and finds the encoders in a file that it watches. One that is to end is
taken from the file. When the proxy has given it up, because no call is under way, the process is asked to end, which it does
when others have fetched what they need from it.
"""

from __future__ import annotations

import contextlib
import enum
import json
import math
import os
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from chiasm.launch.child import Child, ProcessState
from chiasm.launch.plan import ProcessPlan

LOOK_SECONDS = 1.0
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


class _Stage(enum.Enum):
    IDLE = enum.auto()
    RUNNING = enum.auto()
    """It starts, or serves, or is started again after its death."""
    LEAVING = enum.auto()
    """The proxy gives it no more images."""
    ENDING = enum.auto()


@dataclass(eq=False)
class _Encoder:
    """One encoder of the range, whether it runs or not."""

    plan: ProcessPlan
    is_spare: bool = True
    """Whether it was started because it was needed; otherwise with all other instances."""
    stage: _Stage = _Stage.IDLE
    child: Child | None = None
    failures: int = 0
    """Starts in a row that have failed."""
    was_ready: bool = False
    ends_by: float = 0.0


@dataclass(frozen=True)
class Crew:
    """The deployment, as far as its encoders come and go. Nothing here is called from two threads at one time."""

    begin: Callable[[ProcessPlan, bool], Child]
    """Starts a process; the second argument says whether the others can serve without it."""
    forget: Callable[[ProcessPlan], None]
    """Takes a process that has ended from those that there are."""
    desired: Callable[[], float | None]
    """Returns how many encoders the proxy desires; None if it doesn't say."""
    known: Callable[[], Collection[str]]
    """Returns the URLs of all instances that the proxy knows; none if it doesn't answer."""
    say: Callable[[str], None]
    """Tells the operator."""


class Scaling:
    """The encoders of one deployment that come and go, in a thread of its own."""

    def __init__(
        self, crew: Crew, encoders: Sequence[ProcessPlan], number: EncoderNumber, listed_in: Path, call_seconds: float
    ) -> None:
        """``encoders`` are all of them in the order in which they start; ``listed_in`` is the file that the proxy watches.

        An encoder has ``call_seconds`` to end.
        """
        self._crew = crew
        self._encoders = [_Encoder(plan) for plan in encoders]
        self._number = number
        self._listed_in = listed_in
        self._call_seconds = call_seconds
        self._list(self._encoders[: number.target])  # before the proxy looks for it
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._live, name="chiasm-scaling", daemon=True)

    def start(self) -> None:
        """Start the least number of encoders, and follow the proxy from now on."""
        for encoder in self._encoders[: self._number.target]:
            encoder.is_spare = False
            self._begin(encoder)
        self._thread.start()

    def close(self) -> None:
        """Start and end nothing from now on; idempotent."""
        self._over.set()
        with self._lock:  # no start is under way
            pass
        if self._thread.is_alive():
            self._thread.join(_CLOSE_SECONDS)

    def _live(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            self.look(time.monotonic())

    def look(self, now: float) -> None:
        """Ask the proxy once, and do what is to be done."""
        desired = self._crew.desired()
        leaves = any(one.stage is _Stage.LEAVING for one in self._encoders)
        known = self._crew.known() if leaves else ()
        with self._lock:
            if self._over.is_set():
                return
            before = self._running()
            for encoder in list(self._encoders):
                self._settle(encoder, known, now)
            if desired is not None:
                self._number.follow(desired, now)
            self._adjust(now)
            if self._running() != before:
                self._list(self._running())

    # ---- one encoder -----------------------------------------------------------------------------------------------------

    def _settle(self, encoder: _Encoder, known: Collection[str], now: float) -> None:
        """Note what has become of an encoder."""
        child, has_ended = encoder.child, encoder.child is not None and encoder.child.join(0.0)
        if child is None:
            return
        if encoder.stage is _Stage.RUNNING:
            if has_ended:
                self._note_failure(encoder, child, now)
            elif child.state is ProcessState.READY and not encoder.was_ready:
                encoder.was_ready, encoder.failures = True, 0
                self._number.note_success()
        elif has_ended:
            self._crew.forget(encoder.plan)
            encoder.stage, encoder.child = _Stage.IDLE, None
        elif encoder.stage is _Stage.LEAVING:
            if child.state is not ProcessState.READY or (known and encoder.plan.address.url not in known):
                child.end()
                encoder.stage, encoder.ends_by = _Stage.ENDING, now + self._call_seconds + _KILL_SECONDS
        elif now >= encoder.ends_by:
            child.kill()

    def _note_failure(self, encoder: _Encoder, child: Child, now: float) -> None:
        if not encoder.is_spare:  # the deployment ends, or goes on without it
            self._encoders.remove(encoder)
            return
        encoder.failures += 1
        seconds = self._number.note_failure(now)
        why = child.failure.message.rstrip(".") if child.failure is not None else "it has ended"
        self._crew.say(f"{encoder.plan.name} can't be started: {why}. The next start is in {seconds:.0f} s")
        self._crew.forget(encoder.plan)
        encoder.stage, encoder.child = _Stage.IDLE, None

    def _begin(self, encoder: _Encoder) -> None:
        encoder.child = self._crew.begin(encoder.plan, encoder.is_spare)
        encoder.stage, encoder.was_ready = _Stage.RUNNING, False

    def _leave(self, encoder: _Encoder) -> None:
        assert encoder.child is not None
        encoder.child.let_die()
        encoder.stage = _Stage.LEAVING

    # ---- their number ----------------------------------------------------------------------------------------------------

    def _running(self) -> list[_Encoder]:
        return [one for one in self._encoders if one.stage is _Stage.RUNNING]

    def _adjust(self, now: float) -> None:
        """Start encoders that are missing, or let one go that isn't needed."""
        running, target = self._running(), self._number.target
        if len(running) > target:
            last = next((one for one in running if not one.was_ready), running[-1])
            self._crew.say(f"{target} of {len(running)} encoders are enough: {last.plan.name} drains")
            self._leave(last)
        elif len(running) < target and self._number.may_start(now):
            idle = [one for one in self._encoders if one.stage is _Stage.IDLE]
            chosen = sorted(idle, key=lambda one: one.failures)[: target - len(running)]
            if chosen:
                names = ", ".join(one.plan.name for one in chosen)
                self._crew.say(f"{target} encoders are needed, and {len(running)} run: starting {names}")
            for encoder in chosen:
                encoder.is_spare = True
                self._begin(encoder)

    def _list(self, encoders: Sequence[_Encoder]) -> None:
        """Tell the proxy which encoders there are."""
        listed = [{"url": one.plan.address.url, "role": str(one.plan.role)} for one in encoders]
        new = self._listed_in.with_suffix(".new")
        with contextlib.suppress(OSError):  # no room: the proxy keeps what it knows, and the next change tells it
            new.write_text(json.dumps(listed))
            os.replace(new, self._listed_in)
