"""How many encoders the images that come would need.

State only: no clock and no I/O. It goes by the seconds that images cost, not by their number: an image of 4K costs what dozens
of thumbnails do. Instants are seconds on the caller's clock.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

DESIRED_METRIC = "chiasm_fleet_desired_instances"
"""What the proxy calls the number of encoders on its page of metrics."""
WINDOWS_SECONDS = (10.0, 60.0)
_BUSY = (0.85, 0.55)
"""How busy encoders may be on the average of each window: a short burst may take more of them than what lasts."""
_BUCKET_SECONDS = 0.25
_HALF_SECONDS = 0.5
"""Images go on to come if they have come in this time, and in as much before it. Those of one request come at once."""
_SLOTS = 300
"""Parts of the calm while, each of which is remembered by the most that was needed."""


class Backlog(NamedTuple):
    """What has not been encoded at one moment."""

    seconds: float
    """Of encoding."""
    images: int
    encoders: int
    """How many work on it."""


class _Came(NamedTuple):
    """What came in one part of a window."""

    begins: float
    seconds: float
    images: int


class EncoderDemand:
    """The load of one proxy's images, and the encoders for it: more at once, fewer after a calm while.

    What is desired is the most that was needed within that while. So a short burst can't ask for so many that they have to be
    taken back for hours, and bursts that come again soon find the encoders there.
    """

    def __init__(self, wait_seconds: float, start_seconds: float, calm_seconds: float) -> None:
        """Images should wait at most ``wait_seconds``; fewer encoders are enough when that was so for ``calm_seconds``.

        An encoder takes ``start_seconds`` to start: what is done by then needs no further one.
        """
        self._wait_seconds = wait_seconds
        self._start_seconds = start_seconds
        self._came: deque[_Came] = deque()
        """In order of time, as far as the longest window reaches."""
        self._slot_seconds = max(calm_seconds, 1e-3) / _SLOTS
        self._peaks: deque[tuple[int, float]] = deque()
        """Slots of the calm while in which more was needed than ever since, and how much, in order of time."""

    def note(self, seconds: float, now: float) -> None:
        """Note an image that costs an encoder so many seconds; one that costs nothing doesn't count."""
        if not seconds:
            return
        came = _Came(math.floor(now / _BUCKET_SECONDS) * _BUCKET_SECONDS, seconds, 1)
        if self._came and self._came[-1].begins == came.begins:
            before = self._came.pop()
            came = _Came(came.begins, before.seconds + seconds, before.images + 1)
        self._came.append(came)
        self._forget(now)

    def load(self, window_seconds: float, now: float) -> float:
        """Return the seconds of encoding that came in each second of the last window: as many encoders would be busy."""
        return sum(came.seconds for came in self._within(window_seconds, now)) / window_seconds

    def desired(self, backlog: Backlog, now: float) -> float:
        """Return how many encoders there should be: a fraction, so that several proxies can be added up and then rounded up."""
        needed = self._for_backlog(backlog, now)
        for window, busy in zip(WINDOWS_SECONDS, _BUSY, strict=True):
            images = sum(came.images for came in self._within(window, now))
            needed = max(needed, min(self.load(window, now) / busy, images))
        slot = math.floor(now / self._slot_seconds)
        while self._peaks and self._peaks[-1][1] <= needed:
            self._peaks.pop()
        if not self._peaks or self._peaks[-1][0] != slot:
            self._peaks.append((slot, needed))
        while self._peaks[0][0] <= slot - _SLOTS:
            self._peaks.popleft()
        return self._peaks[0][1]

    def _for_backlog(self, backlog: Backlog, now: float) -> float:
        """Return how many encoders keep the wait short, if one that starts now finds anything left to do.

        That is so if the encoders that run have a backlog then, and images go on to come as they do.
        """
        recent = sum(came.seconds for came in self._within(_HALF_SECONDS, now))
        before = sum(came.seconds for came in self._within(2 * _HALF_SECONDS, now)) - recent
        come = min(recent, before) / _HALF_SECONDS
        if backlog.seconds + (come - backlog.encoders) * self._start_seconds <= 0:
            return 0.0
        return min(backlog.seconds / self._wait_seconds, backlog.images)

    def _within(self, window_seconds: float, now: float) -> Iterator[_Came]:
        """Yield what came in the last window, the latest first."""
        for came in reversed(self._came):
            if came.begins <= now - window_seconds:
                return
            yield came

    def _forget(self, now: float) -> None:
        while self._came and self._came[0].begins <= now - max(WINDOWS_SECONDS) - _BUCKET_SECONDS:
            self._came.popleft()
