"""How many encoders the images that come would need.

State only: no clock and no I/O. It goes by the seconds that images cost, not by their number: an image of 4K costs what dozens
of thumbnails do. Instants are seconds on the caller's clock.
"""

from __future__ import annotations

import math
from collections import deque

DESIRED_METRIC = "chiasm_fleet_desired_instances"
"""What the proxy calls the number of encoders on its page of metrics."""
WINDOWS_SECONDS = (10.0, 60.0)
_BUSY = (0.85, 0.55)
"""How busy encoders may be on the average of each window: a short burst may take more of them than what lasts."""
_BUCKET_SECONDS = 1.0
_SLOTS = 300
"""Parts of the calm while, each of which is remembered by the most that was needed."""


class EncoderDemand:
    """The load of one proxy's images, and the encoders for it: more at once, fewer after a calm while.

    What is desired is the most that was needed within that while. So a short burst can't ask for so many that they have to be
    taken back for hours, and bursts that come again soon find the encoders there.
    """

    def __init__(self, wait_seconds: float, calm_seconds: float) -> None:
        """Images should wait at most ``wait_seconds``; fewer encoders are enough when that was so for ``calm_seconds``."""
        self._wait_seconds = wait_seconds
        self._buckets: deque[tuple[float, float]] = deque()
        """When each second of the longest window began, and what the images cost that came in it."""
        self._slot_seconds = max(calm_seconds, 1e-3) / _SLOTS
        self._peaks: deque[tuple[int, float]] = deque()
        """Slots of the calm while in which more was needed than ever since, and how much, in order of time."""

    def note(self, seconds: float, now: float) -> None:
        """Note an image that costs an encoder so many seconds."""
        begins = math.floor(now / _BUCKET_SECONDS) * _BUCKET_SECONDS
        if self._buckets and self._buckets[-1][0] == begins:
            begins, before = self._buckets.pop()
            seconds += before
        self._buckets.append((begins, seconds))
        self._forget(now)

    def load(self, window_seconds: float, now: float) -> float:
        """Return the seconds of encoding that came in each second of the last window: as many encoders would be busy."""
        self._forget(now)
        return sum(seconds for begins, seconds in self._buckets if begins > now - window_seconds) / window_seconds

    def desired(self, outstanding_seconds: float, now: float) -> float:
        """Return how many encoders there should be: a fraction, so that several proxies can be added up and then rounded up.

        ``outstanding_seconds`` is the work that has not been done.
        """
        needed = max(
            outstanding_seconds / self._wait_seconds,
            *(self.load(window, now) / busy for window, busy in zip(WINDOWS_SECONDS, _BUSY, strict=True)),
        )
        slot = math.floor(now / self._slot_seconds)
        while self._peaks and self._peaks[-1][1] <= needed:
            self._peaks.pop()
        if not self._peaks or self._peaks[-1][0] != slot:
            self._peaks.append((slot, needed))
        while self._peaks[0][0] <= slot - _SLOTS:
            self._peaks.popleft()
        return self._peaks[0][1]

    def _forget(self, now: float) -> None:
        while self._buckets and self._buckets[0][0] <= now - max(WINDOWS_SECONDS) - _BUCKET_SECONDS:
            self._buckets.popleft()
