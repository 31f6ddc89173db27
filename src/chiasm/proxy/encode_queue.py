"""The images of all requests that wait for an encoder, and which encoder gets the next one.

State only: no clock and no I/O. Images wait here and not at the encoders, so that one that is due earlier overtakes, and each
goes where :mod:`chiasm.proxy.encode_plan` says by what is known when it begins. Instants are seconds on the caller's clock.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right, insort
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from chiasm.proxy.costs import InstanceCosts
from chiasm.proxy.encode_plan import LOOK_UP_SECONDS, Choice, Device, Entry, Plan, Roster
from chiasm.proxy.encoder_demand import Backlog
from chiasm.proxy.fleet import Fleet
from chiasm.proxy.hedging import HEDGED_SHARE, Hedging
from chiasm.proxy.instance import Instance
from chiasm.proxy.prompts import ItemWork
from chiasm.proxy.published import Published
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
_USUAL_PIXELS = 1 << 20
"""The size of image by which the speeds of encoders are compared."""
_STEP_SHARE = 0.75
_MOST_STEPS = 60.0
_UNKNOWN = InstanceCosts()
"""While there is no encoder."""
_FIRST_WAIT_SECONDS = 0.05
_LONGEST_WAIT_SECONDS = 0.5


class Feed(NamedTuple):
    """What an encoder gets now: images of one request, in the prompt's order, for one call."""

    encoder: Instance
    entries: list[Entry]
    seconds: float = 0.0
    """What the encoder has to compute until it has done them; 0 if they are only looked up."""


class _Desk:
    """One encoder's images, and until when it takes no more."""

    def __init__(self) -> None:
        self.entries: dict[Entry, None] = {}
        self.progressed_at = 0.0
        self.full_until = 0.0
        self.wait_seconds = 0.0
        self.speed_step: int | None = None
        """Its speed, in powers of the square root of 2."""
        # Of its entries; counted when they change, since every decision looks at all encoders.
        self.look_ups = 0
        self.has_room = True
        self.free_at = 0.0
        """When it will have done all of them."""
        self.late_at = math.inf
        """When it should have done those of the call that it is computing; infinite if it computes none."""

    def count(self) -> None:
        """Take account of a change among the entries."""
        seconds = [entry.seconds for entry in self.entries if entry.seconds]
        self.look_ups = len(self.entries) - len(seconds)
        self.has_room = len(seconds) < _ENOUGH_ITEMS or (len(seconds) < _MOST_ITEMS and sum(seconds) < _ENOUGH_SECONDS)
        self.free_at = self.progressed_at + sum(seconds)
        self.late_at = math.inf
        if seconds:
            call = next(entry.call for entry in self.entries if entry.seconds)
            self.late_at = self.progressed_at + sum(entry.seconds for entry in self.entries if entry.call == call)

    @property
    def is_idle(self) -> bool:
        """Whether it encodes nothing."""
        return self.late_at == math.inf

    def weight(self, seconds: float) -> float:
        """Return how fast the encoder counts that takes so many seconds for an image.

        In steps, and only if it has changed by most of a step, so that images don't move whenever an answer corrects the costs.
        """
        speed = max(-_MOST_STEPS, min(_MOST_STEPS, -2 * math.log2(seconds)))
        if self.speed_step is None or abs(speed - self.speed_step) > _STEP_SHARE:
            self.speed_step = round(speed)
        return float(2 ** (self.speed_step / 2))


class EncodeQueue:
    """One for the fleet. ``devices`` tells what language instances do on each device that is known."""

    def __init__(
        self, fleet: Fleet, devices: Callable[[float], Mapping[str, Device]], hedged_share: float = HEDGED_SHARE
    ) -> None:
        self._fleet = fleet
        self._devices = devices
        self._waiting: list[Entry] = []
        self._desks: dict[Instance, _Desk] = {}
        self._published = Published()
        self.hedging = Hedging(hedged_share)
        self._roster_now = Roster((), self._published, ())
        self._desks_now: Sequence[_Desk] = ()
        self._full_until = 0.0
        """Until when some encoder takes no more."""
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

    def finish(
        self,
        entries: Sequence[Entry],
        now: float,
        *,
        seconds: float | None = None,
        found: Collection[str] | None = None,
    ) -> None:
        """Note that an encoder has published all images of a call.

        ``seconds`` is what it has computed for them, and ``found`` are the identifiers of those that it had before; None if it
        doesn't say.
        """
        encoder = entries[0].encoder if entries else None
        for entry in entries:
            self._leave(entry, now)
        if encoder is None:
            return
        for entry in entries:
            self._published.note(encoder, entry.item, None if found is None else entry.item.identifier in found)
        computed = [entry.item.pixels for entry in entries if entry.item.identifier not in (found or ())]
        if seconds is not None and computed:
            encoder.costs.learn_encode(computed, seconds, now)
            self._roster_now.estimate_again(encoder, now)
        self._desk(encoder).wait_seconds = 0.0

    def release(self, entries: Sequence[Entry], now: float) -> None:
        """Note that a call has ended without these images; :meth:`add` those that are to be tried again."""
        for entry in entries:
            self._leave(entry, now)

    def note_lost(self, identifier: str) -> None:
        """Note that an embedding that was published is gone: the image must be encoded again."""
        self._published.note_lost(identifier)

    def pause(self, encoder: Instance, now: float) -> None:
        """Give an encoder nothing for a while, longer each time in a row, because it was full or late."""
        desk = self._desk(encoder)
        desk.wait_seconds = min(2 * desk.wait_seconds, _LONGEST_WAIT_SECONDS) or _FIRST_WAIT_SECONDS
        desk.full_until = now + desk.wait_seconds
        self._full_until = max(self._full_until, desk.full_until)

    # ---- decisions -----------------------------------------------------------------------------------------------------

    def feed(self, now: float) -> list[Feed]:
        """Give waiting images to encoders that have room.

        An image whose encoder has no room keeps its place there, and those behind it see that. Images that the encoder has
        need no room, since they are only looked up.
        """
        roster, desks = self._roster(now)
        self._note_busy(now)
        if not self._waiting:
            return []
        plan = self._plan(now, out=self._full(now))
        has_room = any(desk.has_room for desk in desks)
        given: list[Entry] = []
        for entry in self._waiting[:_EXAMINED]:
            if not has_room and not roster.holders(entry.item.identifier):
                continue
            choice = plan.add(entry, excluded=entry.failed_at)
            if choice is None:
                continue
            desk = desks[roster.index[choice.encoder]]
            if desk.has_room or not choice.seconds:
                self._give(entry, choice, now)
                given.append(entry)
                has_room = desk.has_room or any(desk.has_room for desk in desks)
        for entry in given:
            self._take_out(entry)
        self._note_busy(now)
        feeds = self._calls(given, now)
        for feed in feeds:
            if feed.seconds:
                self.hedging.begin()
        return feeds

    def hedge(self, entries: Sequence[Entry], now: float) -> Feed | None:
        """Give the images of a late call to a second encoder as well, under entries of their own, in the same order.

        Returns None if that isn't allowed now, an image was hedged before, or no other encoder is idle and takes all at once.
        """
        roster, desks = self._roster(now)
        if not entries or not self.hedging.is_allowed(now) or any(entry.is_hedged for entry in entries):
            return None
        excluded = {entry.encoder for entry in entries}.union(*(entry.failed_at for entry in entries))
        idle = [
            index
            for index, (encoder, desk) in enumerate(zip(roster.encoders, desks, strict=True))
            if not desk.entries
            and desk.full_until <= now
            and encoder not in excluded
            and len(_parts(entries, *_limits(encoder, entries))) == 1
        ]
        if not idle:
            return None
        seconds = [roster.seconds(entry.item.pixels, now) for entry in entries]
        chosen = min(idle, key=lambda index: sum(of_image[index] for of_image in seconds))
        encoder = roster.encoders[chosen]
        copies: list[Entry] = []
        for entry, of_image in zip(entries, seconds, strict=True):
            entry.is_hedged = True
            copy = Entry(
                entry.item,
                entry.due,
                request=entries[0].request,
                language=entry.language,
                size_bytes=entry.size_bytes,
            )
            self._give(copy, Choice(encoder, of_image[chosen], of_image[chosen]), now)
            copies.append(copy)
        self.hedging.spend()
        self._note_busy(now)
        (feed,) = self._calls(copies, now)
        return feed

    def wakes_at(self, now: float) -> float | None:
        """Return when :meth:`feed` should be called although nothing has happened; None if it needn't."""
        if not self._waiting:
            return None
        _, desks = self._roster(now)
        return min([now + _LONGEST_WAIT_SECONDS, *(desks[index].full_until for index in self._full(now))])

    def stranded(self) -> list[Entry]:
        """Return the waiting images that no healthy encoder may get."""
        healthy = set(self._fleet.healthy(Role.ENCODER))
        if not healthy:
            return list(self._waiting)
        return [entry for entry in self._waiting[:_EXAMINED] if healthy <= entry.failed_at]

    def backlog(self, now: float) -> Backlog:
        """Return what all encoders together have to compute for the images that they have and those that wait."""
        _, desks = self._roster(now)
        left = sum(max(0.0, desk.free_at - max(now, desk.progressed_at)) for desk in desks)
        return Backlog(
            seconds=left + sum(self._cost(entry.item, now) for entry in self._waiting),
            images=len(self._waiting) + sum(len(desk.entries) - desk.look_ups for desk in desks),
            encoders=len(desks),
        )

    def cost(self, item: ItemWork, now: float) -> float:
        """Return what an image costs the fastest encoder; nothing if one has the embedding."""
        roster, _ = self._roster(now)
        return 0.0 if roster.holders(item.identifier) else self._cost(item, now)

    def _cost(self, item: ItemWork, now: float) -> float:
        roster, _ = self._roster(now)
        return min(roster.seconds(item.pixels, now), default=0.0) or _UNKNOWN.encode_seconds(item.pixels, now)

    def is_at_encoder(self, identifier: str, now: float) -> bool:
        """Return whether a healthy encoder has an embedding in its memory, as far as is known."""
        roster, _ = self._roster(now)
        return any(roster.encoders[index].ec_place for index in roster.holders(identifier))

    def plan(self, due: float, now: float) -> Plan:
        """Return what the encoders have to do before new images that are due at ``due``."""
        plan = self._plan(now)
        for encoder, left in plan.left.items():
            for entry in self._desk(encoder).entries:
                plan.ready[entry.item.identifier] = left if entry.seconds else LOOK_UP_SECONDS
        if self._waiting and plan.left:
            ahead = self._waiting[: bisect_right(self._waiting, (due, math.inf), key=_order)]
            for entry in ahead[:_FORECAST]:
                if choice := plan.add(entry, entry.failed_at):
                    plan.ready[entry.item.identifier] = choice.ready_seconds
            plan.spread(ahead[_FORECAST:])
        return plan

    def _plan(self, now: float, out: Collection[int] = ()) -> Plan:
        roster, _ = self._roster(now)
        return Plan(roster, self._devices(now), now, out=out)

    def _full(self, now: float) -> list[int]:
        """Return which encoders get nothing for a while."""
        if now >= self._full_until:
            return []
        _, desks = self._roster(now)
        return [index for index, desk in enumerate(desks) if desk.full_until > now]

    def _roster(self, now: float) -> tuple[Roster, Sequence[_Desk]]:
        """Return the healthy encoders, and their desks."""
        encoders = self._fleet.healthy(Role.ENCODER)
        if encoders is not self._roster_now.encoders:
            known = set(self._fleet.instances)
            self._desks = {one: desk for one, desk in self._desks.items() if desk.entries or one in known}
            self._desks_now = [self._desk(encoder) for encoder in encoders]
            self._roster_now = Roster(
                encoders,
                self._published,
                [
                    desk.weight(encoder.costs.encode_seconds(_USUAL_PIXELS, now))
                    for encoder, desk in zip(encoders, self._desks_now, strict=True)
                ],
            )
            for encoder in encoders:
                self._count(encoder)
        return self._roster_now, self._desks_now

    # ---- bookkeeping ---------------------------------------------------------------------------------------------------

    def _give(self, entry: Entry, choice: Choice, now: float) -> None:
        desk = self._desk(choice.encoder)
        if desk.is_idle:
            desk.progressed_at = now
        desk.entries[entry] = None
        entry.encoder, entry.seconds, entry.call = choice.encoder, choice.seconds, 0
        self._count(choice.encoder)

    def _leave(self, entry: Entry, now: float) -> None:
        if entry.encoder is not None:
            desk = self._desk(entry.encoder)
            if entry in desk.entries:
                del desk.entries[entry]
                if entry.seconds:
                    desk.progressed_at = now
                self._count(entry.encoder)
            entry.encoder = None

    def _note_busy(self, now: float) -> None:
        _, desks = self._roster(now)
        self.hedging.note_busy(sum(not desk.is_idle for desk in desks) / max(1, len(desks)), now)

    def _count(self, encoder: Instance) -> None:
        """Take account of a change among an encoder's images."""
        desk, roster = self._desk(encoder), self._roster_now
        desk.count()
        index = roster.index.get(encoder)
        if index is not None:
            roster.free_at[index], roster.late_at[index] = desk.free_at, desk.late_at
            roster.look_ups[index] = desk.look_ups

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

    def _calls(self, given: Sequence[Entry], now: float) -> list[Feed]:
        """Put images of one request that one encoder gets into one call, up to its limits of images and of bytes."""
        calls: dict[tuple[Instance, int], list[Entry]] = {}
        for entry in given:
            assert entry.encoder is not None
            calls.setdefault((entry.encoder, id(entry.request)), []).append(entry)
        feeds: list[Feed] = []
        for (encoder, _), entries in calls.items():
            for part in _parts(entries, *_limits(encoder, entries)):
                own = sum(entry.seconds for entry in part)
                feeds.append(Feed(encoder, part, max(own, self._desk(encoder).free_at - now) if own else 0.0))
        for feed in feeds:
            number = next(self._numbers)
            for entry in feed.entries:
                entry.call = number
        for encoder in {feed.encoder for feed in feeds}:
            self._count(encoder)
        return feeds


def _limits(encoder: Instance, entries: Sequence[Entry]) -> tuple[int, int]:
    """Return how many of these images an encoder takes in a call, and how many bytes of images."""
    most = (encoder.health and encoder.health.max_items) or len(entries)
    most_bytes = (encoder.health and encoder.health.max_body_bytes) or _CALL_BYTES
    return most, most_bytes - _ENVELOPE_BYTES


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
