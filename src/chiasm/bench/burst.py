"""A calm stream of requests with one burst in it: when they come, and what becomes of them in a real deployment."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from chiasm.bench import requests
from chiasm.bench.client import RequestFailedError
from chiasm.bench.load import open_loop
from chiasm.bench.measurement import Bench
from chiasm.bench.statistics import median
from chiasm.bench.topology import colocated, running
from chiasm.launch import Deployment, ProcessState
from chiasm.tasks import beside
from chiasm.wire import Role

_SIDE = 1024
"""Of the demo's work for an image so large, most is the encoder's."""
_PHOTOS = 8
_ALONE = 5
_LIMIT = 5.0
"""A first token is in time within so many times what it takes alone."""
_LOOK_SECONDS = 0.05
_COMMENT = b"\xff\xfe"


@dataclass(frozen=True)
class Wave:
    """When requests come."""

    seconds: float
    """From the beginning to the end."""
    burst_at: float
    burst_seconds: float = 30.0
    factor: float = 10.0
    """How many times as many come during the burst."""

    def times(self, rate: float, chance: random.Random) -> list[float]:
        """Return random times of arrival, independent of each other, ``rate`` per second outside of the burst."""
        calm = self.burst_at + self.burst_seconds * self.factor + (self.seconds - self.burst_at - self.burst_seconds)
        found: list[float] = []
        passed = chance.expovariate(rate)
        while passed < calm:
            found.append(self._stretched(passed))
            passed += chance.expovariate(rate)
        return found

    def is_in_burst(self, when: float) -> bool:
        return self.burst_at <= when < self.burst_at + self.burst_seconds

    def _stretched(self, calm_seconds: float) -> float:
        """Return when so much has come as would come in ``calm_seconds`` without the burst."""
        later = calm_seconds - self.burst_at
        within = min(max(0.0, later), self.burst_seconds * self.factor)
        return calm_seconds - within + within / self.factor


@dataclass
class Ridden:
    """What became of a burst."""

    ttft_seconds: list[float | None] = field(default_factory=list)
    """Of each request in order; None for one that failed."""
    limit_seconds: float = 0.0
    failures: list[str] = field(default_factory=list)
    encoder_seconds: float = 0.0
    most: int = 0
    """Encoders that ran at one time."""
    start_seconds: list[float] = field(default_factory=list)
    """From the start of each further encoder until it was ready."""

    def in_time(self, among: Sequence[bool] | None = None) -> float:
        """Return the share of requests in time, of all or of some."""
        chosen = [
            one
            for one, counts in zip(self.ttft_seconds, among or [True] * len(self.ttft_seconds), strict=True)
            if counts
        ]
        return sum(one is not None and one <= self.limit_seconds for one in chosen) / max(1, len(chosen))


async def ride(
    bench: Bench, model: str, times: Sequence[float], *, seconds: float, encoders: tuple[int, int], calm_seconds: float
) -> Ridden:
    """Send requests with an image each to a PD with so many encoders, at least and at most, on the same cores."""
    least, most = encoders
    config = colocated(model, {Role.ENCODER: most, Role.PD: 1})
    of_encoders = replace(config.roles[Role.ENCODER], least=least)
    config = replace(
        config,
        roles={**config.roles, Role.ENCODER: of_encoders},
        proxy_settings={"scale_down_seconds": calm_seconds},
    )
    found = Ridden()
    bodies = await asyncio.to_thread(_bodies, bench.seed, len(times) + _ALONE + 1)
    async with running(bench, config) as (deployment,):
        alone = [(await bench.client.chat(deployment.url, body)).ttft_seconds for body in bodies[: _ALONE + 1]]
        found.limit_seconds = _LIMIT * median(alone[1:])
        bench.phase(f"{least} to {most} encoders", len(times))

        async def send(number: int) -> float | None:
            try:
                answer = await bench.client.chat(deployment.url, bodies[_ALONE + 1 + number])
            except RequestFailedError as error:
                found.failures.append(error.message)
                return None
            finally:
                bench.advance()
            return answer.ttft_seconds

        async with beside(_watch(deployment, found)):
            began = time.monotonic()
            found.ttft_seconds = await open_loop(times, send)
            await asyncio.sleep(max(0.0, began + seconds - time.monotonic()))
    return found


async def _watch(deployment: Deployment, found: Ridden) -> None:
    """Count the encoders that run, until cancelled."""
    before = time.monotonic()
    starting: dict[str, float] = {}
    while True:
        await asyncio.sleep(_LOOK_SECONDS)
        now = time.monotonic()
        encoders = [one for one in deployment.processes if one.role is Role.ENCODER]
        found.encoder_seconds += len(encoders) * (now - before)
        found.most = max(found.most, len(encoders))
        for one in encoders:
            if one.state is ProcessState.STARTING:
                starting.setdefault(one.name, before)
            elif one.name in starting:
                found.start_seconds.append(now - starting.pop(one.name))
        before = now


def _bodies(seed: int, count: int) -> list[bytes]:
    """Return questions about an image each. All images are new, but some look the same, since that costs as much."""
    photos = [requests.photo(f"burst {seed} {number}", _SIDE) for number in range(min(_PHOTOS, count))]
    return [
        requests.stream([requests.image_part(_noted(photos[number % len(photos)], number)), requests.text_part("?")], 2)
        for number in range(count)
    ]


def _noted(jpeg: bytes, number: int) -> bytes:
    """Return a JPEG with a comment, so that it is another file."""
    comment = f"{number}".encode()
    return jpeg[:2] + _COMMENT + (len(comment) + 2).to_bytes(2) + comment + jpeg[2:]
