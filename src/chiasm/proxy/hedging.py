"""When a call to an encoder is late, and whether its images may go to a second encoder as well.

A call is late when it has taken longer than nineteen of twenty calls, measured against what was expected of each. A second call
costs work, so few calls get one, and none while the encoders are busy. After J. Dean and L. Barroso, "The tail at scale"
(Communications of the ACM 56(2), 2013).

State only: no clock and no I/O. Instants are seconds on the caller's clock.
"""

from __future__ import annotations

import math
from collections import deque

_LATE = 0.95
"""Share of calls that are answered before a call counts as late."""
_CALLS = 200
"""Calls, of all encoders, from which that is known; none is late before the fewest are known."""
_FEWEST_CALLS = 20
_OVERHEAD_SECONDS = 0.01
"""What a call takes beside the encoder's computing."""
_LEAST_SECONDS = 0.05
"""No call is late before."""
HEDGED_SHARE = 0.05
"""Of the calls, so many may be hedged."""
_MOST_SAVED = 4
"""Hedges that may follow each other at once."""
_MOST_BUSY = 0.7
"""Share of the encoders' time from which on no call is hedged."""
_BUSY_SECONDS = 5.0
"""The time over which that share is averaged: what is older by this counts a third."""


class Hedging:
    """One for the fleet."""

    def __init__(self, share: float = HEDGED_SHARE) -> None:
        """``share`` of the calls may be hedged; 0: none."""
        self._calls_per_hedge = round(1 / share) if share > 0 else None
        self._ratios: deque[float] = deque(maxlen=_CALLS)
        """Of the last calls: seconds until the answer, over what was expected."""
        self._saved = 0
        """Calls that weren't hedged yet, up to those of the most hedges that are saved."""
        self._busy = 0.0
        self._busy_since = 0.0
        """The share of encoders that are busy has been the same since then."""
        self._average = 0.0

    def begin(self) -> None:
        """Note that a call begins which isn't a hedge."""
        self._saved = min(_MOST_SAVED * (self._calls_per_hedge or 0), self._saved + 1)

    def learn(self, seconds: float, expected: float) -> None:
        """Note how long a call took of which ``expected`` seconds of computing were expected."""
        self._ratios.append(seconds / (expected + _OVERHEAD_SECONDS))

    def late_after(self, expected: float) -> float | None:
        """Return after how many seconds a call is late of which this is expected; None if that isn't known."""
        if len(self._ratios) < _FEWEST_CALLS:
            return None
        ratio = sorted(self._ratios)[math.ceil(_LATE * len(self._ratios)) - 1]
        return max(_LEAST_SECONDS, ratio * (expected + _OVERHEAD_SECONDS))

    def note_busy(self, share: float, now: float) -> None:
        """Note that from now on this share of the encoders is encoding."""
        self._average = self.busy(now)
        self._busy, self._busy_since = share, now

    def busy(self, now: float) -> float:
        """Return the share of their time for which the encoders have been encoding lately."""
        left = math.exp(min(0.0, self._busy_since - now) / _BUSY_SECONDS)
        return self._busy + (self._average - self._busy) * left

    def is_allowed(self, now: float) -> bool:
        """Whether a late call may be hedged."""
        return (
            self._calls_per_hedge is not None and self._saved >= self._calls_per_hedge and self.busy(now) < _MOST_BUSY
        )

    def spend(self) -> None:
        """Note that a call is hedged."""
        self._saved -= self._calls_per_hedge or 0
