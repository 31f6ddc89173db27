"""What a request's calls of instances have in common."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from chiasm.proxy.timing import Timing


@dataclass(eq=False)
class RequestContext:
    """One request, as it is known to instances. Compared by identity."""

    request_id: str
    deadline: float
    """On the clock of ``time.monotonic``."""
    passed_on: dict[str, str]
    """Headers of the client that instances get to see."""
    model: str | None = None
    timing: Timing = field(default_factory=Timing)
    encoder_calls: int = 0

    @property
    def seconds_left(self) -> float:
        return max(0.0, self.deadline - time.monotonic())

    def headers_for_encoder(self) -> dict[str, str]:
        """As ``headers``, with an id of its own for each call, since an encoder may get several at a time."""
        self.encoder_calls += 1
        return {**self.headers(), "X-Request-Id": f"{self.request_id}-e{self.encoder_calls}"}

    def headers(self) -> dict[str, str]:
        """For one call; made anew each time, so that a retry takes nothing over from the try before."""
        return {
            **self.passed_on,
            "X-Request-Id": self.request_id,
            "X-Request-Deadline-Ms": str(int(self.seconds_left * 1000)),
        }
