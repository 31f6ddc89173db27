"""A simulation of encoders that come and go as the proxy desires, while images arrive in a calm stream with a burst in it.

What desires, follows and places is the product's own code: the proxy's count of encoders, the policy of ``chiasm serve`` and
the queue of images. Only the encoders are played, and time is simulated, so the same images give the same figures everywhere.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from chiasm.bench.burst import Wave
from chiasm.bench.routing import ENCODE_SECONDS, PIXELS, Image, Routed, RoutingSimulation, SimulatedProxy
from chiasm.launch.scaling import LOOK_SECONDS, STEP_SECONDS, EncoderNumber
from chiasm.proxy.config import ProxyConfig
from chiasm.proxy.encoder_demand import EncoderDemand
from chiasm.proxy.hedging import HEDGED_SHARE
from chiasm.proxy.prompts import ItemWork
from chiasm.wire import Role

SIZES = (PIXELS // 4, PIXELS // 2, PIXELS)
MEAN_SECONDS = ENCODE_SECONDS * sum(SIZES) / len(SIZES) / PIXELS
"""What an encoder takes for an image, on average."""
_LIMIT = 5.0
"""An image is in time if it is encoded within so many times what its encoding takes alone."""


def images_of(wave: Wave, load: float, seed: int) -> list[Image]:
    """Return new images of three sizes, which keep ``load`` encoders busy outside of the burst."""
    chance = random.Random(seed)
    times = wave.times(load / MEAN_SECONDS, chance)
    return [Image(when, f"image {number}", chance.choice(SIZES)) for number, when in enumerate(times)]


def lone_requests(seconds: float, every_seconds: float, images: int, seed: int) -> list[Image]:
    """Return new images of the largest size, of which so many come at once now and then: those of one request."""
    chance = random.Random(seed)
    times = [every_seconds * (number + chance.random()) for number in range(int(seconds / every_seconds))]
    return [Image(when, f"image {number} at {when}", PIXELS) for when in times for number in range(images)]


@dataclass(frozen=True)
class Fleet:
    """Which encoders there may be."""

    least: int
    most: int
    start_seconds: float = 2.0
    """From the decision to start an encoder until the proxy uses it."""
    wait_seconds: float = ProxyConfig.encode_wait_seconds
    calm_seconds: float = ProxyConfig.scale_down_seconds


@dataclass(frozen=True)
class Change:
    """Another number of encoders that run."""

    when: float
    encoders: int


@dataclass(frozen=True)
class Scaled:
    """What came of it."""

    images: Sequence[Image]
    routed: Routed
    encoder_seconds: float
    """That all encoders ran, together, also while they started."""
    changes: Sequence[Change]

    def in_time(self, wave: Wave | None = None) -> float:
        """Return the share of images that were encoded in time, of all or of those of the burst."""
        chosen = [one for one in self.images if wave is None or wave.is_in_burst(one.arrival)]
        limits = [(one, _LIMIT * ENCODE_SECONDS * one.pixels / PIXELS) for one in chosen]
        return sum(self.routed.seconds_of[one.identifier] <= limit for one, limit in limits) / max(1, len(chosen))


class ScalingSimulation(RoutingSimulation):
    """One proxy in front of encoders that are as many as it desires."""

    def __init__(self, fleet: Fleet) -> None:
        super().__init__(fleet.most, capacity=1, hedged_share=HEDGED_SHARE)
        self._fleet = fleet
        self._proxy = self.proxies[0]
        self._healths = [one.health for one in self._proxy.fleet.instances]
        self._demand = EncoderDemand(fleet.wait_seconds, fleet.start_seconds, fleet.calm_seconds)
        self._number = EncoderNumber(fleet.least, fleet.most, min(fleet.calm_seconds, STEP_SECONDS))
        self._running: list[int] = list(range(fleet.least))
        self._is_leaving: int | None = None
        self._changes = [Change(0.0, fleet.least)]
        for index in range(fleet.least, fleet.most):
            self._remove(index)

    def follow(self, images: Sequence[Image], seconds: float) -> Scaled:
        """Simulate images that come within so many seconds."""
        if self._fleet.least < self._fleet.most:
            looks = int(seconds / LOOK_SECONDS)
            for look in range(1, looks):
                self.time.at(look * LOOK_SECONDS, self._look)
        routed = self.run(images)
        ends = [one.when for one in self._changes[1:]] + [seconds]
        ran = sum(
            (min(end, seconds) - min(one.when, seconds)) * one.encoders
            for one, end in zip(self._changes, ends, strict=True)
        )
        return Scaled(images, routed, ran, self._changes)

    def _arrive(self, proxy: SimulatedProxy, image: Image) -> None:
        cost = proxy.queue.cost(ItemWork(image.identifier, image.pixels), self.time.now)
        self._demand.note(cost, self.time.now)
        super()._arrive(proxy, image)

    def _look(self) -> None:
        now = self.time.now
        desired = self._demand.desired(self._proxy.queue.backlog(now), now)
        target = self._number.follow(desired, now)
        free = [index for index in range(self._fleet.most) if index not in self._running]
        if len(self._running) < target:
            for index in free[: target - len(self._running)]:
                self._running.append(index)
                self.time.at(now + self._fleet.start_seconds, partial(self._add, index))
            self._changes.append(Change(now, len(self._running)))
        elif self._is_leaving is None and len(self._running) > target:
            self._is_leaving = self._running[-1]
            self._remove(self._is_leaving)
            self._await_end(self._is_leaving)

    def _add(self, index: int) -> None:
        if index in self._running:
            fleet = self._proxy.fleet
            health = self._healths[index]
            assert health is not None
            fleet.succeed(fleet.add(_url(index), Role.ENCODER), health)
            self._feed(self._proxy)

    def _remove(self, index: int) -> None:
        instance = self._proxy.fleet.get(_url(index))
        if instance is not None:
            self._proxy.fleet.remove(instance)

    def _await_end(self, index: int) -> None:
        """Let an encoder end when it has nothing to do."""
        if self.machines[index].queue:
            self.time.at(self.time.now + LOOK_SECONDS, partial(self._await_end, index))
            return
        self._running.remove(index)
        self._is_leaving = None
        self.machines[index].memory.clear()
        self._changes.append(Change(self.time.now, len(self._running)))


def _url(index: int) -> str:
    return f"http://encoder-{index}"
