"""How many encoders the images that come would need.

State only: no clock and no I/O. It goes by the seconds that images cost, not by their number: an image of 4K costs what dozens
of thumbnails do. Instants are seconds on the caller's clock.
"""

from __future__ import annotations

import math
from collections import deque

WINDOWS_SECONDS = (10.0, 60.0)
_BUSY = (0.85, 0.55)
"""How busy encoders may be on the average of each window: a short burst may take more of them than what lasts."""
_BUCKET_SECONDS = 1.0


class EncoderDemand:
    """The load of one proxy's images, and the encoders for it: more at once, fewer one at a time after a calm while."""

    def __init__(self, wait_seconds: float, calm_seconds: float) -> None:
        """Images should wait at most ``wait_seconds``; one encoder fewer is enough when that was so for ``calm_seconds``."""
        self._wait_seconds = wait_seconds
        self._calm_seconds = calm_seconds
        self._buckets: deque[tuple[float, float]] = deque()
        """When each second of the longest window began, and what the images cost that came in it."""
        self._desired = 1
        self._calm_since = -math.inf

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

    def desired(self, outstanding_seconds: float, now: float) -> int:
        """Return how many encoders there should be, at least 1. ``outstanding_seconds`` is the work that has not been done."""
        needed = max(
            1,
            math.ceil(outstanding_seconds / self._wait_seconds),
            *(
                math.ceil(self.load(window, now) / busy - 1e-9)
                for window, busy in zip(WINDOWS_SECONDS, _BUSY, strict=True)
            ),
        )
        if needed >= self._desired:
            self._desired, self._calm_since = needed, now
        elif now - self._calm_since >= self._calm_seconds:
            self._desired, self._calm_since = self._desired - 1, now
        return self._desired

    def _forget(self, now: float) -> None:
        while self._buckets and self._buckets[0][0] <= now - max(WINDOWS_SECONDS) - _BUCKET_SECONDS:
            self._buckets.popleft()
