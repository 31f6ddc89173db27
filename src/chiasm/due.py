"""When a request's work is due, which is the order in which the proxy sends images to encoders and engines serve requests.

Earliest deadline first (Liu and Layland, 1973), with a deadline in proportion to the request's own work: small requests
overtake large ones, and nobody starves, since whatever comes late enough is due later.
"""

from __future__ import annotations

import math

STRETCH = 5.0
"""A request is due when this many times the seconds that its own work takes have passed since it arrived."""
BEFORE_ALL_NEW = -math.inf
"""When an answer is due that was cut off on another instance, so that it is not cut off again."""


def due(arrival: float, work_seconds: float) -> float:
    """Return when work of so many seconds is due, on the clock of ``arrival``."""
    return arrival + STRETCH * work_seconds
