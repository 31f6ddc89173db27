"""A simulation of encoders with memories of their own, behind the proxy's own queue of images. No network, and no real time.

Images come at random, are queued, fed and finished by the code that the proxy runs. Only the encoders are played: each encodes
one image after the other, remembers the embeddings that it used last, and encodes equal images that it has at one time once.
"""

from __future__ import annotations

import itertools
import random
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from chiasm.bench.simulated_time import SimulatedTime
from chiasm.proxy.encode_plan import LOOK_UP_SECONDS, Device, Entry
from chiasm.proxy.encode_queue import EncodeQueue
from chiasm.proxy.fleet import Fleet
from chiasm.proxy.instance import Instance
from chiasm.proxy.prompts import ItemWork
from chiasm.wire import Costs, ECPlace, Health, ImageCost, Role

PIXELS = 1 << 20
ENCODE_SECONDS = 0.1
"""For an image of so many pixels; others in proportion."""
SLOWER = 10.0
"""How much longer an encoding takes that is slow."""


@dataclass(frozen=True)
class Image:
    """An image that a request brings."""

    arrival: float
    identifier: str
    pixels: int = PIXELS


@dataclass
class Routed:
    """What came of a simulation."""

    hits: int = 0
    """Images whose embedding was there."""
    joined: int = 0
    """Images that were being encoded, or waited, for an earlier one."""
    encoded: list[int] = field(default_factory=list)
    """Images that each encoder has encoded."""
    waits: list[float] = field(default_factory=list)
    """Seconds from the arrival of each image that was encoded until its encoding began."""
    decision_seconds: list[float] = field(default_factory=list)
    """Real time that the proxy took to choose encoders, for each image that was given to one."""
    seconds: list[float] = field(default_factory=list)
    """From the arrival of each image that was sent to an encoder until its embedding is there."""
    seconds_of: dict[str, float] = field(default_factory=dict)
    """The same by identifier; of images that come again, the last."""
    hedges: int = 0
    encoded_at: dict[str, list[int]] = field(default_factory=dict)
    """By identifier: the encoders that have encoded it, in order."""

    @property
    def hit_share(self) -> float:
        return self.hits / max(1, self.hits + sum(self.encoded))


class _Machine:
    """One encoder."""

    def __init__(self, capacity: int, speed: float) -> None:
        self.memory: OrderedDict[str, None] = OrderedDict()
        self.capacity = capacity
        self.speed = speed
        self.queue: deque[tuple[Image, list[Callable[[bool, float, float], None]]]] = deque()
        self.is_busy = False

    def remember(self, identifier: str) -> None:
        self.memory[identifier] = None
        self.memory.move_to_end(identifier)
        if len(self.memory) > self.capacity:
            self.memory.popitem(last=False)


@dataclass
class _Call:
    """One image at one encoder, or at two if the first is late: the first answer counts."""

    image: Image
    encoder: Instance
    entries: list[Entry]
    started: float
    expected: float
    """Seconds of computing; 0 for a look-up."""
    is_over: bool = False


class SimulatedProxy:
    """One proxy: its queue, and the images that are on their way."""

    def __init__(self, speeds: Sequence[float], peers: bool, hedged_share: float) -> None:
        self.fleet = Fleet()
        for index, speed in enumerate(speeds):
            place = ECPlace(host="simulated", port=1 + index, engine_id=str(index)) if peers else None
            images = [
                ImageCost(pixels=size, tokens=size >> 10, encode_seconds=_seconds(size) / speed) for size in _SIZES
            ]
            health = Health(role=Role.ENCODER, model="simulated", ec_place=place, costs=Costs(images=images))
            self.fleet.succeed(self.fleet.add(f"http://encoder-{index}", Role.ENCODER), health)
        self.queue = EncodeQueue(self.fleet, _no_devices, hedged_share)
        self.flying: dict[str, Image] = {}


_SIZES = tuple(PIXELS << shift >> 4 for shift in range(9))


def _seconds(pixels: int) -> float:
    return ENCODE_SECONDS * pixels / PIXELS


def _no_devices(now: float) -> Mapping[str, Device]:
    return {}


class RoutingSimulation:
    """Some proxies in front of the same encoders; images come to the proxies in turn."""

    def __init__(
        self,
        encoders: int | Sequence[float],
        *,
        capacity: int,
        proxies: int = 1,
        peers: bool = True,
        slow_share: float = 0.0,
        hedged_share: float = 0.0,
    ) -> None:
        """``encoders`` are their speeds, or their number; ``capacity`` is how many embeddings each remembers.

        Without ``peers``, the queue believes that embeddings are found wherever they were encoded, and so prefers no encoder.
        ``slow_share`` of the encodings take ``SLOWER`` times as long; ``hedged_share`` of the calls may be hedged.
        """
        speeds = [1.0] * encoders if isinstance(encoders, int) else encoders
        self.proxies = [SimulatedProxy(speeds, peers, hedged_share) for _ in range(proxies)]
        self._slow_share = slow_share
        self._chance = random.Random(0)
        self.machines = [_Machine(capacity, speed) for speed in speeds]
        self.result = Routed(encoded=[0] * len(speeds))
        self.time = SimulatedTime()

    def run(self, images: Sequence[Image]) -> Routed:
        for number, image in enumerate(images):
            proxy = self.proxies[number % len(self.proxies)]
            self.time.at(image.arrival, partial(self._arrive, proxy, image))
        self.time.run()
        return self.result

    def _arrive(self, proxy: SimulatedProxy, image: Image) -> None:
        if image.identifier in proxy.flying:
            self.result.joined += 1
            return
        proxy.flying[image.identifier] = image
        entry = Entry(ItemWork(image.identifier, image.pixels), image.arrival, request=image)
        proxy.queue.add(entry)
        self._feed(proxy)

    def _feed(self, proxy: SimulatedProxy) -> None:
        started = time.perf_counter()
        feeds = proxy.queue.feed(self.time.now)
        seconds = time.perf_counter() - started
        given = sum(len(feed.entries) for feed in feeds)
        self.result.decision_seconds += [seconds / max(1, given)] * given
        for feed in feeds:
            with proxy.fleet.working(feed.encoder, 0.0):
                pass
            for entry in feed.entries:
                image = proxy.flying[entry.item.identifier]
                expected = feed.seconds / len(feed.entries)
                call = _Call(image, feed.encoder, [entry], self.time.now, expected)
                self._watch(proxy, call)
                self._send(proxy, feed.encoder, entry, call)

    def _watch(self, proxy: SimulatedProxy, call: _Call) -> None:
        """Hedge a call when it is late."""
        seconds = proxy.queue.hedging.late_after(call.expected) if call.expected else None
        if seconds is not None:
            self.time.at(self.time.now + seconds, partial(self._hedge, proxy, call))

    def _hedge(self, proxy: SimulatedProxy, call: _Call) -> None:
        if call.is_over:
            return
        feed = proxy.queue.hedge(call.entries, self.time.now)
        if feed is None:
            self._watch(proxy, call)
            return
        self.result.hedges += 1
        call.entries += feed.entries
        self._send(proxy, feed.encoder, feed.entries[0], call)

    def _send(self, proxy: SimulatedProxy, encoder: Instance, entry: Entry, call: _Call) -> None:
        index = int(encoder.url.rpartition("-")[2])
        machine = self.machines[index]
        image = call.image

        def answered(found: bool, seconds: float) -> None:
            if call.is_over:
                return
            call.is_over = True
            del proxy.flying[image.identifier]
            names = {image.identifier} if found else set[str]()
            proxy.queue.finish([entry], self.time.now, seconds=seconds, found=names)
            proxy.queue.release([other for other in call.entries if other is not entry], self.time.now)
            if call.expected:
                proxy.queue.hedging.learn(self.time.now - call.started, call.expected)
            if entry is not call.entries[0]:
                proxy.queue.pause(call.encoder, self.time.now)
            self.result.seconds.append(self.time.now - image.arrival)
            self.result.seconds_of[image.identifier] = self.time.now - image.arrival
            self._feed(proxy)

        if image.identifier in machine.memory:
            machine.remember(image.identifier)
            self.result.hits += 1
            self.time.at(self.time.now + LOOK_UP_SECONDS, lambda: answered(True, 0.0))
            return
        for queued, listeners in machine.queue:
            if queued.identifier == image.identifier:
                listeners.append(lambda found, began, seconds: answered(found, seconds))
                self.result.joined += 1
                return
        machine.queue.append((image, [lambda found, began, seconds: answered(found, seconds)]))
        self._work(index)

    def _work(self, index: int) -> None:
        machine = self.machines[index]
        if machine.is_busy or not machine.queue:
            return
        machine.is_busy = True
        image, listeners = machine.queue[0]
        began, seconds = self.time.now, _seconds(image.pixels) / machine.speed
        if self._chance.random() < self._slow_share:
            seconds *= SLOWER
        self.result.waits.append(began - image.arrival)
        self.result.encoded[index] += 1
        self.result.encoded_at.setdefault(image.identifier, []).append(index)

        def ended() -> None:
            machine.is_busy = False
            machine.queue.popleft()
            machine.remember(image.identifier)
            for listener in listeners:
                listener(False, began, seconds)
            self._work(index)

        self.time.at(began + seconds, ended)


def popular(count: int, *, items: int, rate: float, seed: int) -> list[Image]:
    """Return images whose popularity is Zipf's, at random times with ``rate`` images a second on average."""
    chance = random.Random(seed)
    weights = list(itertools.accumulate(1 / rank for rank in range(1, items + 1)))
    images: list[Image] = []
    now = 0.0
    for number in chance.choices(range(items), cum_weights=weights, k=count):
        now += chance.expovariate(rate)
        images.append(Image(now, f"image {number}"))
    return images


def new(count: int, *, rate: float, seed: int) -> list[Image]:
    """Return images that nobody has seen, of three sizes."""
    chance = random.Random(seed)
    images: list[Image] = []
    now = 0.0
    for number in range(count):
        now += chance.expovariate(rate)
        images.append(Image(now, f"image {number}", chance.choice((PIXELS // 4, PIXELS // 2, PIXELS))))
    return images


def shared_hit_share(images: Sequence[Image], capacity: int) -> float:
    """Return the share of images that one memory of all encoders would have had."""
    memory = _Machine(capacity, 1.0)
    hits = 0
    for image in images:
        hits += image.identifier in memory.memory
        memory.remember(image.identifier)
    return hits / len(images)
