"""The proxy of the simulation: its own fleet and placement, fed with instances that report computed or measured costs.

This is the only file of the package that knows what the proxy's parts do.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import msgspec

from chiasm.engine.fluency import slowdown_beside_streams
from chiasm.plan.costs import CostModel, StepShape
from chiasm.plan.layouts import Candidate, PlannedInstance
from chiasm.plan.shapes import ModelShape
from chiasm.proxy.agreement import PROMPT_ROLES
from chiasm.proxy.encode_plan import Entry
from chiasm.proxy.fleet import Fleet
from chiasm.proxy.instance import Instance
from chiasm.proxy.placement import Placed, Placement
from chiasm.proxy.prompts import ItemWork, Prefix, Work
from chiasm.wire import Costs, ECPlace, Health, ImageCost, Role

_BYTES_PER_TOKEN = 4
_SIDES = (256, 512, 1024, 2048)
_ROWS = 256


@dataclass(frozen=True)
class SentImage:
    """An image of a request."""

    identifier: str
    height: int
    width: int


@dataclass(eq=False)
class Placing:
    """One request as the proxy knows it."""

    placed: Placed
    server: int
    """Index of its language instance among the candidate's instances."""
    encodes_itself: bool
    entries: dict[str, Entry] = field(default_factory=dict)
    """Images that wait or are being encoded for it, by identifier."""
    decoding: ExitStack = field(default_factory=ExitStack)
    """Held while a decode instance has it."""


@dataclass(frozen=True)
class Fed:
    """Images that an encoder gets in one call."""

    server: int
    """Index of the encoder among the candidate's instances."""
    entries: Sequence[Entry]


class Proxy:
    """Decides, as the proxy does. Knows no clock."""

    def __init__(self, candidate: Candidate, shape: ModelShape, costs: Sequence[CostModel]) -> None:
        """``costs`` are those of the candidate's places."""
        self._fleet = Fleet()
        self._placement = Placement(self._fleet)
        self._index: dict[Instance, int] = {}
        for index, planned in enumerate(candidate.instances):
            instance = self._fleet.add(f"http://{index}", planned.role)
            self._index[instance] = index
            place = candidate.places[planned.place]
            health = Health(
                role=planned.role,
                model=shape.name,
                fingerprint="plan",
                ec_place=_place(index) if planned.role is Role.ENCODER else None,
                kv_connector="plan" if planned.role in (Role.PREFILL, Role.DECODE) else None,
                device=place.device_type,
                cpus=[] if candidate.on_gpus else list(range(place.cores)),
                device_id=f"place {planned.place}",
                costs=reported(planned, shape, costs[planned.place], place.device_type),
            )
            self._fleet.succeed(instance, health)

    def place(
        self, now: float, text_tokens: int, images: Sequence[SentImage], *, only: int | None = None
    ) -> Placing | None:
        """Choose the language instance of a new request; None if nobody takes it. With ``only``, it is that one."""
        items = [ItemWork(image.identifier, image.height * image.width) for image in images]
        names = [image.identifier for image in images]
        prefixes = [Prefix(hash(tuple(names[: count + 1])), 0) for count in range(len(names))]
        work = Work(now, text_tokens * _BYTES_PER_TOKEN, items, prefixes)
        others = () if only is None else [one for one, index in self._index.items() if index != only]
        placed = self._placement.place(work, PROMPT_ROLES, now, exclude=others)
        if placed is None:
            return None
        self._take(placed.instance)
        return Placing(placed, self._index[placed.instance], placed.instance.role is Role.AGGREGATED)

    def queue(self, placing: Placing, images: Sequence[SentImage]) -> None:
        """Let images of a request wait for encoders; those that are being encoded for another one must not be among them."""
        items = [ItemWork(image.identifier, image.height * image.width) for image in images]
        for item, entry in zip(items, self._placement.queue(placing.placed, items), strict=True):
            placing.entries[item.identifier] = entry

    def hasten(self, entry: Entry, placing: Placing) -> None:
        """Note that another request needs an image too."""
        self._placement.images.hasten(entry, placing.placed.prompt.due)

    def feed(self, now: float) -> list[Fed]:
        """Return what encoders get now."""
        feeds = self._placement.images.feed(now)
        for feed in feeds:
            self._take(feed.encoder)
        return [Fed(self._index[feed.encoder], feed.entries) for feed in feeds]

    def encoded(self, entries: Sequence[Entry], now: float, *, seconds: float, found: Collection[str]) -> None:
        """Note that an encoder has answered a call; ``found`` are the identifiers of the images that were published before."""
        self._placement.images.finish(entries, now, seconds=seconds, found=found)

    def discard(self, entry: Entry, now: float) -> None:
        """Forget an image that nobody needs any more."""
        self._placement.images.discard(entry, now)

    def embedded(self, placing: Placing) -> None:
        """Note that all images of a request are encoded."""
        self._placement.embedded(placing.placed)

    def first_token(self, placing: Placing, now: float, *, work_seconds: float, prompt_tokens: int) -> None:
        """Note the first token of a request, and what computing its prompt took."""
        self._placement.first_token(placing.placed, now, work_seconds=work_seconds, prompt_tokens=prompt_tokens)

    def end(self, placing: Placing, now: float) -> None:
        """Note that a request has left its language instance; for a prefill instance, after the first token."""
        self._placement.end(placing.placed, now)
        placing.decoding.close()

    def choose_decode(self, placing: Placing) -> int | None:
        """Return the decode instance for a prompt that was computed; None if there is none."""
        instance = self._fleet.choose(Role.DECODE)
        if instance is None:
            return None
        placing.decoding.enter_context(self._fleet.working(instance, 1.0))
        return self._index[instance]

    def _take(self, instance: Instance) -> None:
        """Count a call, so that equals take turns."""
        with self._fleet.working(instance, 0.0):
            pass


def reported(planned: PlannedInstance, shape: ModelShape, costs: CostModel, device_type: str) -> Costs:
    """Return what the instance would report of itself after its calibration at start; on ``cpu`` or ``cuda``."""
    encodes = planned.role in (Role.ENCODER, Role.AGGREGATED)
    computes = planned.role is not Role.ENCODER
    threads = 1  # an engine measures itself on one core of a CPU, and a GPU counts as one
    images = [
        ImageCost(
            pixels=side * side,
            tokens=shape.tokens_of(side, side),
            encode_seconds=(costs.prepare_seconds(side, side) + costs.encode_seconds(side, side, threads))
            if encodes
            else 0.0,
        )
        for side in _SIDES
    ]
    measured = Costs(
        prefill_seconds_per_token=costs.step_seconds(StepShape(_ROWS, _ROWS**2 / 2), threads) / _ROWS
        if computes
        else 0.0,
        decode_step_seconds=costs.step_seconds(StepShape(1, 0, _ROWS), threads) if computes else 0.0,
        images=images,
    )
    return msgspec.structs.replace(measured, beside_streams=slowdown_beside_streams(device_type, measured))


def _place(index: int) -> ECPlace:
    """Return where an encoder keeps its embeddings, so that images have homes as behind the proxy."""
    return ECPlace(host="plan", port=1 + index, engine_id=str(index))
