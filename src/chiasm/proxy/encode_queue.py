"""The images of all requests that wait for an encoder, and which encoder gets the next one.

State only: no clock and no I/O. Images wait here and not at the encoders, so that one that is due earlier overtakes, and each
goes where it is finished first as is known when it begins. Instants are seconds on the caller's clock.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right, insort
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

from chiasm.proxy.fleet import Fleet, Instance
from chiasm.proxy.prompts import ItemWork
from chiasm.wire import Role

_ENOUGH_ITEMS = 2
"""An encoder has one image being encoded and one waiting, which it preprocesses meanwhile."""
_ENOUGH_SECONDS = 0.05
"""It gets more only while they are less work than this, so that small images don't cost a round trip each."""
_MOST_ITEMS = 64
_CALL_BYTES = 64 << 20
"""The largest call to an encoder that doesn't say what it takes."""
_ENVELOPE_BYTES = 64 << 10
"""What a call holds beside its images."""
_EXAMINED = 256
"""Images, from the one that is due first, among which one is sought for an encoder with room."""
_FORECAST = 64
"""Images that are planned one by one to tell when a new one would be encoded; of those behind, only the sum counts."""
_MAX_PUBLISHED = 65536
HINDRANCE = 0.05
"""What a second by which another request or a running stream is delayed counts against a second until a first token."""
_FIRST_WAIT_SECONDS = 0.05
_LONGEST_WAIT_SECONDS = 0.5


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
        """Encoding there, as estimated."""
        self.number = 0
        self.call = 0
        """Which call carries it."""


class Choice(NamedTuple):
    """The encoder for an image."""

    encoder: Instance
    seconds: float
    """What encoding it takes there."""
    ready_seconds: float
    """From now until its embedding is published."""


class Feed(NamedTuple):
    """What an encoder gets now: images of one request, in the prompt's order, for one call."""

    encoder: Instance
    entries: list[Entry]


class _Desk:
    """One encoder's images, and until when it takes no more."""

    def __init__(self) -> None:
        self.entries: dict[Entry, None] = {}
        self.progressed_at = 0.0
        self.full_until = 0.0
        self.wait_seconds = 0.0

    def seconds_left(self, now: float) -> float:
        if not self.entries:
            return 0.0
        call = next(iter(self.entries)).call
        first = sum(entry.seconds for entry in self.entries if entry.call == call)
        elapsed = max(0.0, now - self.progressed_at)
        # A call that takes longer than estimated is expected to take as long again as it is late.
        return sum(entry.seconds for entry in self.entries) - first + abs(first - elapsed)

    @property
    def has_room(self) -> bool:
        seconds = [entry.seconds for entry in self.entries if entry.seconds]
        return len(seconds) < _ENOUGH_ITEMS or (len(seconds) < _MOST_ITEMS and sum(seconds) < _ENOUGH_SECONDS)


class EncodeQueue:
    """One for the fleet. ``devices`` tells what language instances do on each device that is known."""

    def __init__(self, fleet: Fleet, devices: Callable[[float], Mapping[str, Device]]) -> None:
        self._fleet = fleet
        self._devices = devices
        self._waiting: list[Entry] = []
        self._desks: WeakKeyDictionary[Instance, _Desk] = WeakKeyDictionary()
        self._published: OrderedDict[str, None] = OrderedDict()
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._waiting)

    # ---- what happens --------------------------------------------------------------------------------------------------

    def add(self, entry: Entry) -> None:
        """Let an image wait, for the first time or again."""
        entry.number = next(self._numbers)
        insort(self._waiting, entry, key=_order)

    def hasten(self, entry: Entry, due: float) -> None:
        """Note that a request that is due earlier needs the image too."""
        if due < entry.due:
            is_waiting = self._take_out(entry)
            entry.due = due
            if is_waiting:
                insort(self._waiting, entry, key=_order)

    def discard(self, entry: Entry, now: float) -> None:
        """Forget an image that nobody needs any more, wherever it is."""
        self._take_out(entry)
        self._leave(entry, now)

    def finish(self, entries: Sequence[Entry], now: float, *, seconds: float | None = None) -> None:
        """Note that an encoder has published all images of a call.

        ``seconds`` is what it has computed for them; None if it doesn't say, or has found some of them published.
        """
        encoder = entries[0].encoder if entries else None
        if encoder is not None and seconds is not None:
            encoder.costs.learn_encode([entry.item.pixels for entry in entries], seconds, now)
        for entry in entries:
            self._leave(entry, now)
            self._published[entry.item.identifier] = None
            self._published.move_to_end(entry.item.identifier)
        while len(self._published) > _MAX_PUBLISHED:
            self._published.popitem(last=False)
        if encoder is not None:
            self._desk(encoder).wait_seconds = 0.0

    def release(self, entries: Sequence[Entry], now: float) -> None:
        """Note that a call has ended without these images; :meth:`add` those that are to be tried again."""
        for entry in entries:
            self._leave(entry, now)

    def note_lost(self, identifier: str) -> None:
        """Note that an embedding that was published is gone: the image must be encoded again."""
        self._published.pop(identifier, None)

    def note_full(self, encoder: Instance, now: float) -> None:
        """Note that an encoder took no more images; it gets none for a while, longer each time in a row."""
        desk = self._desk(encoder)
        desk.wait_seconds = min(2 * desk.wait_seconds, _LONGEST_WAIT_SECONDS) or _FIRST_WAIT_SECONDS
        desk.full_until = now + desk.wait_seconds

    # ---- decisions -----------------------------------------------------------------------------------------------------

    def feed(self, now: float) -> list[Feed]:
        """Give waiting images to encoders that have room, each where it is finished first.

        An image whose best encoder has no room keeps its place there, and those behind it see that. Images that were
        published before need no room, since they are only looked up.
        """
        if not self._waiting:
            return []
        plan = self._plan(now)
        plan.leave_out(encoder for encoder in list(plan.left) if self._desk(encoder).full_until > now)
        roomy = {encoder for encoder in plan.left if self._desk(encoder).has_room}
        given: list[Entry] = []
        for entry in self._waiting[:_EXAMINED]:
            is_published = entry.item.identifier in self._published
            if not roomy and not is_published:
                continue
            choice = plan.add(entry, excluded=entry.failed_at)
            if choice is not None and (choice.encoder in roomy or is_published):
                self._give(entry, choice, now)
                given.append(entry)
                if not self._desk(choice.encoder).has_room:
                    roomy.discard(choice.encoder)
        for entry in given:
            self._take_out(entry)
        return self._calls(given)

    def wakes_at(self, now: float) -> float | None:
        """Return when :meth:`feed` should be called although nothing has happened; None if it needn't."""
        if not self._waiting:
            return None
        full = [desk.full_until for desk in self._desks.values() if desk.full_until > now]
        return min([now + _LONGEST_WAIT_SECONDS, *full])

    def stranded(self) -> list[Entry]:
        """Return the waiting images that no healthy encoder may get."""
        healthy = set(self._fleet.healthy(Role.ENCODER))
        if not healthy:
            return list(self._waiting)
        return [entry for entry in self._waiting[:_EXAMINED] if healthy <= entry.failed_at]

    def encode_seconds(self, encoder: Instance, item: ItemWork, now: float) -> float:
        """Return what an image costs an encoder; nothing if it was published before."""
        return 0.0 if item.identifier in self._published else encoder.costs.encode_seconds(item.pixels, now)

    def plan(self, due: float, now: float) -> Plan:
        """Return what the encoders have to do before new images that are due at ``due``."""
        plan = self._plan(now)
        for encoder, left in plan.left.items():
            for entry in self._desk(encoder).entries:
                plan.ready[entry.item.identifier] = left
        if self._waiting and plan.left:
            ahead = self._waiting[: bisect_right(self._waiting, (due, math.inf), key=_order)]
            for entry in ahead[:_FORECAST]:
                if choice := plan.add(entry, entry.failed_at):
                    plan.ready[entry.item.identifier] = choice.ready_seconds
            plan.spread(ahead[_FORECAST:])
        return plan

    def _plan(self, now: float) -> Plan:
        encoders = self._fleet.healthy(Role.ENCODER)
        return Plan(
            left={encoder: self._desk(encoder).seconds_left(now) for encoder in encoders},
            devices=self._devices(now),
            encode_seconds=lambda encoder, item: self.encode_seconds(encoder, item, now),
        )

    # ---- bookkeeping ---------------------------------------------------------------------------------------------------

    def _give(self, entry: Entry, choice: Choice, now: float) -> None:
        desk = self._desk(choice.encoder)
        if not desk.entries:
            desk.progressed_at = now
        desk.entries[entry] = None
        entry.encoder, entry.seconds = choice.encoder, choice.seconds

    def _leave(self, entry: Entry, now: float) -> None:
        if entry.encoder is not None:
            desk = self._desk(entry.encoder)
            if entry in desk.entries:
                del desk.entries[entry]
                desk.progressed_at = now
            entry.encoder = None

    def _take_out(self, entry: Entry) -> bool:
        """Remove an image from those that wait; return whether it was among them."""
        index = bisect_right(self._waiting, _order(entry), key=_order) - 1
        found = index >= 0 and self._waiting[index] is entry
        if found:
            del self._waiting[index]
        return found

    def _desk(self, encoder: Instance) -> _Desk:
        desk = self._desks.get(encoder)
        if desk is None:
            desk = self._desks[encoder] = _Desk()
        return desk

    def _calls(self, given: Sequence[Entry]) -> list[Feed]:
        """Put images of one request that one encoder gets into one call, up to its limits of images and of bytes."""
        calls: dict[tuple[Instance, int], list[Entry]] = {}
        for entry in given:
            assert entry.encoder is not None
            calls.setdefault((entry.encoder, id(entry.request)), []).append(entry)
        feeds: list[Feed] = []
        for (encoder, _), entries in calls.items():
            most = (encoder.health and encoder.health.max_items) or len(entries)
            most_bytes = ((encoder.health and encoder.health.max_body_bytes) or _CALL_BYTES) - _ENVELOPE_BYTES
            feeds += [Feed(encoder, part) for part in _parts(entries, most, most_bytes)]
        for feed in feeds:
            number = next(self._numbers)
            for entry in feed.entries:
                entry.call = number
        return feeds


class Plan:
    """What encoders would have to do if images went to them one after the other, each where it is finished first."""

    def __init__(
        self,
        *,
        left: dict[Instance, float],
        devices: Mapping[str, Device],
        encode_seconds: Callable[[Instance, ItemWork], float],
    ) -> None:
        self.left = left
        """Seconds of work of each healthy encoder."""
        self.ready: dict[str, float] = {}
        """From now until images that wait or are being encoded already are published, by identifier."""
        self.devices = devices
        """What language instances do on each device that is known."""
        self._encode_seconds = encode_seconds

    def ready_seconds(self, items: Sequence[ItemWork]) -> list[float]:
        """Return the time until each of a new request's images would be published; infinite if nobody can encode it."""
        plan = Plan(left=dict(self.left), devices=self.devices, encode_seconds=self._encode_seconds)
        ready: list[float] = []
        for item in items:
            known = 0.0 if item.is_stored else self.ready.get(item.identifier)
            choice = None if known is not None else plan.add(Entry(item, 0.0))
            ready.append(known if known is not None else choice.ready_seconds if choice else math.inf)
        return ready

    def leave_out(self, encoders: Iterable[Instance]) -> None:
        """Plan nothing for these encoders."""
        for encoder in encoders:
            del self.left[encoder]

    def add(self, entry: Entry, excluded: Collection[Instance] = ()) -> Choice | None:
        """Plan an image where it is finished first; None if no encoder may get it.

        Among equals it goes to an encoder on the device that needs the embedding, then to the one idle longest.
        """
        near = entry.language.device_id if entry.language else ""
        best: Choice | None = None
        best_rank: tuple[float, bool, int] | None = None
        for encoder, left in self.left.items():
            if encoder in excluded:
                continue
            seconds = self._encode_seconds(encoder, entry.item)
            device = self.devices.get(encoder.device_id, _IDLE)
            ready = left + seconds + min(seconds, device.seconds) if seconds else 0.0
            rank = (
                ready + seconds * device.streams * HINDRANCE,
                not near or encoder.device_id != near,
                encoder.last_taken,
            )
            if best_rank is None or rank < best_rank:
                best, best_rank = Choice(encoder, seconds, ready), rank
        if best is None:
            return None
        self.left[best.encoder] += best.seconds
        return best

    def spread(self, entries: Sequence[Entry]) -> None:
        """Plan many images, each spread over all encoders."""
        if entries and self.left:
            first = next(iter(self.left))
            share = sum(self._encode_seconds(first, entry.item) for entry in entries) / len(self.left)
            self.left = {encoder: left + share for encoder, left in self.left.items()}


def _parts(entries: Sequence[Entry], most: int, most_bytes: int) -> list[list[Entry]]:
    """Cut a list into parts that keep both limits; an image that is too large by itself has its own."""
    parts: list[list[Entry]] = []
    size_bytes = 0
    for entry in entries:
        size_bytes += entry.size_bytes
        if not parts or len(parts[-1]) == most or size_bytes > most_bytes:
            parts.append([])
            size_bytes = entry.size_bytes
        parts[-1].append(entry)
    return parts


def _order(entry: Entry) -> tuple[float, float]:
    return entry.due, entry.number
