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

from chiasm.proxy.fleet import Instance
from chiasm.proxy.prompts import ItemWork
from chiasm.proxy.published import Shelf
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


_IDLE = Device()


class Entry:
    """One image to encode. Compared by identity."""

    def __init__(
        self,
        item: ItemWork,
        due: float,
        *,
        request: object = None,
        language: Instance | None = None,
        size_bytes: int = 0,
    ) -> None:
        """``request`` is the one whose images may share a call; ``language`` the instance that needs the embedding.

        ``size_bytes`` is what the image takes in a call.
        """
        self.item = item
        self.size_bytes = size_bytes
        self.due = due
        self.request = request
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


class Choice(NamedTuple):
    """The encoder for an image."""

    encoder: Instance
    seconds: float
    """What encoding it takes there; 0 if it is only looked up."""
    ready_seconds: float
    """From now until its embedding is published."""


class Roster:
    """The healthy encoders, what they have, and what images cost them. Those of one roster are known by their index."""

    def __init__(self, encoders: Sequence[Instance], shelves: Sequence[Shelf], weights: Sequence[float]) -> None:
        """``shelves`` and ``weights`` belong to the encoders in order."""
        self.encoders = encoders
        self.index = {encoder: index for index, encoder in enumerate(encoders)}
        self.shelves = shelves
        self.prefers = any(encoder.ec_place for encoder in encoders)
        """Whether it matters for later which encoder an image goes to."""
        self.rendezvous = Rendezvous([encoder.url for encoder in encoders], weights)
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
        return [index for index, shelf in enumerate(self.shelves) if identifier in shelf.entries]


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
        left: list[float],
        look_ups: list[int],
        out: Collection[int] = (),
    ) -> None:
        """``left`` are seconds of work of each encoder of the roster, ``look_ups`` the embeddings that it is looking up.

        Those that are ``out`` get nothing.
        """
        self.ready: dict[str, float] = {}
        """From now until images that wait or are being encoded already are published, by identifier."""
        self.devices = devices
        """What language instances do on each device that is known."""
        self._roster = roster
        self._now = now
        self._left = left
        self._look_ups = look_ups
        self._out = out
        self._costs: dict[int, _SizeCosts] = {}

    @property
    def left(self) -> dict[Instance, float]:
        """Seconds of work of each healthy encoder."""
        return dict(zip(self._roster.encoders, self._left, strict=True))

    def ready_seconds(self, items: Sequence[ItemWork]) -> list[float]:
        """Return the time until each of a new request's images would be published; infinite if nobody can encode it."""
        plan = Plan(
            self._roster, self.devices, self._now, left=[*self._left], look_ups=[*self._look_ups], out=self._out
        )
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
        roster = self._roster
        costs = self._costs_of(entry.item.pixels)
        scores = list(map(operator.add, self._left, costs.score))
        holders = roster.holders(entry.item.identifier)
        for index in holders:
            scores[index] = min(LOOK_UP_SECONDS, _LOOK_UP_SHARE * costs.score[index]) * (1 + self._look_ups[index])
        for index in self._out:
            scores[index] = math.inf
        for encoder in excluded:
            if encoder in roster.index:
                scores[roster.index[encoder]] = math.inf
        best = min(scores, default=math.inf)
        if best == math.inf:
            return None
        limit = best * (1 + _LATER) if roster.prefers else best
        candidates = [index for index, score in enumerate(scores) if score <= limit]
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
            self._look_ups[chosen] += 1
            return Choice(roster.encoders[chosen], 0.0, scores[chosen])
        ready = self._left[chosen] + costs.ready[chosen]
        self._left[chosen] += costs.seconds[chosen]
        return Choice(roster.encoders[chosen], costs.seconds[chosen], ready)

    def spread(self, entries: Sequence[Entry]) -> None:
        """Plan many images, each spread over all encoders."""
        if entries and self._left:
            seconds = [
                0.0 if self._roster.holders(entry.item.identifier) else self._costs_of(entry.item.pixels).seconds[0]
                for entry in entries
            ]
            share = sum(seconds) / len(self._left)
            self._left = [left + share for left in self._left]

    def _costs_of(self, pixels: int) -> _SizeCosts:
        costs = self._costs.get(pixels)
        if costs is None:
            seconds = ready = score = self._roster.seconds(pixels, self._now)
            if self.devices:
                there = [self.devices.get(encoder.device_id, _IDLE) for encoder in self._roster.encoders]
                ready = [one + min(one, device.seconds) for one, device in zip(seconds, there, strict=True)]
                score = [
                    until + one * device.streams * HINDRANCE
                    for until, one, device in zip(ready, seconds, there, strict=True)
                ]
            costs = self._costs[pixels] = _SizeCosts(seconds, ready, score)
        return costs
