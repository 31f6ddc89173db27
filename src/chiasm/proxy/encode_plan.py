"""Which encoder an image goes to: the rule, applied to images one after the other.

An image goes to an encoder at which it is ready first, or at most a quarter later. Among these, the image's own preference
decides (:mod:`chiasm.proxy.rendezvous`), which is the same in all proxies: so an image comes to the encoder that has it, while
its place is bounded by load as in V. Mirrokni, M. Thorup and M. Zadimoghaddam, "Consistent hashing with bounded loads" (SODA
2018). Where all encoders publish into one store, preference gains nothing: the image goes where it is ready first.

State only: no clock and no I/O.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from chiasm.proxy.instance import Instance
from chiasm.proxy.prompts import ItemWork
from chiasm.proxy.published import Published
from chiasm.proxy.rendezvous import Rendezvous

HINDRANCE = 0.05
"""What a second by which another request or a running stream is delayed counts against a second until a first token."""
LOOK_UP_SECONDS = 0.002
"""What it costs an encoder to find that it has an embedding."""
_LOOK_UP_SHARE = 0.1
"""But it costs at most this share of encoding it."""
_LATER = 0.25
"""How much later than at best, as a share of that time, an image may be ready at the encoder that it prefers."""
_MAX_SIZES = 256
_COSTS_LAST_SECONDS = 1.0
"""For so long an estimate is used again, unless an answer corrects it."""


class Device(NamedTuple):
    """What language instances do on a device."""

    seconds: float = 0.0
    """Computing that is left until their first tokens."""
    streams: int = 0
    computing: int = 0
    """How many of them have such computing left."""
    cores: int = 1
    """How many can compute at once without slowing each other down."""

    def without(self, seconds: float) -> Device:
        """Return the same without one language instance, which computes for ``seconds``."""
        return self._replace(seconds=max(0.0, self.seconds - seconds), computing=self.computing - (seconds > 0))

    def delay(self, own_seconds: float) -> float:
        """Return how much longer other work takes there, which takes ``own_seconds`` by itself."""
        if not self.computing:
            return 0.0
        return min(own_seconds, self.seconds) * max(0.0, 1 - (self.cores - 1) / self.computing)


_IDLE = Device()


class Entry:
    """One image to encode. Compared by identity."""

    def __init__(
        self,
        item: ItemWork,
        due: float,
        *,
        request: object = None,
        sharers: str = "",
        language: Instance | None = None,
        size_bytes: int = 0,
    ) -> None:
        """``request`` is the one whose images may share a call; ``language`` the instance that needs the embedding.

        ``sharers`` tells whose requests may wait for it, and ``size_bytes`` is what the image takes in a call.
        """
        self.item = item
        self.size_bytes = size_bytes
        self.due = due
        self.request = request
        self.sharers = sharers
        self.language = language
        self.failed_at: set[Instance] = set()
        """Encoders that don't get it again."""
        self.encoder: Instance | None = None
        """Where it is being encoded; None while it waits."""
        self.seconds = 0.0
        """Encoding there, as estimated; 0 if it is only looked up."""
        self.number = 0
        self.call = 0
        """Which call carries it."""
        self.is_hedged = False
        """Whether a second encoder has got it too."""


class Choice(NamedTuple):
    """The encoder for an image."""

    encoder: Instance
    seconds: float
    """What encoding it takes there; 0 if it is only looked up."""
    ready_seconds: float
    """From now until its embedding is published."""


class Roster:
    """The healthy encoders, what they have, and what images cost them. Those of one roster are known by their index."""

    def __init__(self, encoders: Sequence[Instance], published: Published, weights: Sequence[float]) -> None:
        """``weights`` belong to the encoders in order."""
        self.encoders = encoders
        self.index = {encoder: index for index, encoder in enumerate(encoders)}
        self._copies = published.copies
        self._shelves = [published.at(encoder) for encoder in encoders]
        self.prefers = any(encoder.ec_place for encoder in encoders)
        """Whether it matters for later which encoder an image goes to."""
        self.rendezvous = Rendezvous([encoder.url for encoder in encoders], weights)
        self.free_at = [0.0] * len(encoders)
        """When each will have done all its work."""
        self.late_at = [math.inf] * len(encoders)
        """When each should have done the call that it is computing; infinite if it computes none."""
        self.look_ups = [0] * len(encoders)
        """The embeddings that each is looking up."""
        self._seconds: dict[int, list[float]] = {}
        self._estimated_at = -math.inf

    def seconds(self, pixels: int, now: float) -> Sequence[float]:
        """Return what encoding an image of this size takes each encoder."""
        if now - self._estimated_at > _COSTS_LAST_SECONDS or len(self._seconds) >= _MAX_SIZES:
            self._seconds.clear()
            self._estimated_at = now
        seconds = self._seconds.get(pixels)
        if seconds is None:
            seconds = [encoder.costs.encode_seconds(pixels, now) for encoder in self.encoders]
            self._seconds[pixels] = seconds
        return seconds

    def estimate_again(self, encoder: Instance, now: float) -> None:
        """Note that the costs of an encoder have been corrected."""
        index = self.index.get(encoder)
        if index is not None:
            for pixels, seconds in self._seconds.items():
                seconds[index] = encoder.costs.encode_seconds(pixels, now)

    def holders(self, identifier: str) -> list[int]:
        """Return the encoders that have an embedding, as far as is known."""
        if identifier not in self._copies:
            return []
        return [index for index, shelf in enumerate(self._shelves) if identifier in shelf.entries]

    def free_from(self, now: float) -> list[float]:
        """Return when each encoder can begin something new."""
        free = [free_at if free_at > now else now for free_at in self.free_at]
        if min(self.late_at, default=math.inf) < now:
            for index, late_at in enumerate(self.late_at):
                # A call that takes longer than estimated is expected to take as long again as it is late.
                if late_at < now:
                    free[index] = self.free_at[index] + 2 * (now - late_at)
        return free


class _SizeCosts(NamedTuple):
    """What images of one size cost each encoder."""

    seconds: Sequence[float]
    ready: Sequence[float]
    """Until it is published, if nothing is before it."""
    score: Sequence[float]
    """The same, and what that costs others."""


class Plan:
    """What encoders would have to do if images went to them one after the other, each by the rule."""

    def __init__(
        self,
        roster: Roster,
        devices: Mapping[str, Device],
        now: float,
        *,
        out: Collection[int] = (),
        before: Plan | None = None,
    ) -> None:
        """Encoders that are ``out`` get nothing; what was planned ``before`` goes before."""
        self.ready: dict[str, float] = {}
        """From now until images that wait or are being encoded already are published, by identifier."""
        self.devices = devices
        """What language instances do on each device that is known."""
        self._roster = roster
        self._now = now
        self._free_from: list[float] = [*before._free_from] if before else roster.free_from(now)
        self._look_ups: dict[int, int] = dict(before._look_ups) if before else {}
        self._out = out
        self._costs: dict[int, _SizeCosts] = {}

    @property
    def left(self) -> dict[Instance, float]:
        """Seconds of work of each healthy encoder."""
        left = (free_from - self._now for free_from in self._free_from)
        return dict(zip(self._roster.encoders, left, strict=True))

    def ready_seconds(self, items: Sequence[ItemWork]) -> list[float]:
        """Return the time until each of a new request's images would be published; infinite if nobody can encode it."""
        plan = Plan(self._roster, self.devices, self._now, out=self._out, before=self)
        ready: list[float] = []
        for item in items:
            known = 0.0 if item.is_stored else self.ready.get(item.identifier)
            choice = None if known is not None else plan.add(Entry(item, 0.0))
            ready.append(known if known is not None else choice.ready_seconds if choice else math.inf)
        return ready

    def add(self, entry: Entry, excluded: Iterable[Instance] = ()) -> Choice | None:
        """Plan an image; return where it goes, or None if no encoder may get it.

        Where preference gains nothing, it goes among equals to an encoder on the device that needs the embedding, then to the
        one idle longest.
        """
        roster, now = self._roster, self._now
        costs = self._costs_of(entry.item.pixels)
        ready_at = list(map(operator.add, self._free_from, costs.score))
        holders = roster.holders(entry.item.identifier)
        for index in holders:
            look_ups = 1 + roster.look_ups[index] + self._look_ups.get(index, 0)
            ready_at[index] = now + look_ups * min(LOOK_UP_SECONDS, _LOOK_UP_SHARE * costs.score[index])
        for index in self._out:
            ready_at[index] = math.inf
        for encoder in excluded:
            if encoder in roster.index:
                ready_at[roster.index[encoder]] = math.inf
        best = min(ready_at, default=math.inf)
        if best == math.inf:
            return None
        limit = best + _LATER * (best - now) if roster.prefers else best
        candidates = [index for index, at in enumerate(ready_at) if at <= limit]
        if roster.prefers:
            chosen = roster.rendezvous.best(entry.item.identifier, candidates)
        else:
            near = entry.language.device_id if entry.language else ""
            encoders = roster.encoders
            chosen = min(
                candidates,
                key=lambda index: (not near or encoders[index].device_id != near, encoders[index].last_taken),
            )
        if chosen in holders:
            self._look_ups[chosen] = self._look_ups.get(chosen, 0) + 1
            return Choice(roster.encoders[chosen], 0.0, ready_at[chosen] - now)
        ready_seconds = self._free_from[chosen] - now + costs.ready[chosen]
        self._free_from[chosen] += costs.seconds[chosen]
        return Choice(roster.encoders[chosen], costs.seconds[chosen], ready_seconds)

    def spread(self, entries: Sequence[Entry]) -> None:
        """Plan many images, each spread over all encoders."""
        if entries and self._free_from:
            seconds = [
                0.0 if self._roster.holders(entry.item.identifier) else self._costs_of(entry.item.pixels).seconds[0]
                for entry in entries
            ]
            share = sum(seconds) / len(self._free_from)
            self._free_from = [free_from + share for free_from in self._free_from]

    def _costs_of(self, pixels: int) -> _SizeCosts:
        costs = self._costs.get(pixels)
        if costs is None:
            seconds = ready = score = self._roster.seconds(pixels, self._now)
            if self.devices:
                there = [self.devices.get(encoder.device_id, _IDLE) for encoder in self._roster.encoders]
                ready = [one + device.delay(one) for one, device in zip(seconds, there, strict=True)]
                score = [
                    until + one * device.streams * HINDRANCE
                    for until, one, device in zip(ready, seconds, there, strict=True)
                ]
            costs = self._costs[pixels] = _SizeCosts(seconds, ready, score)
        return costs
