"""Placement in a small discrete-event simulation of encoders and PDs: what it loses against the best choice in hindsight."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from functools import partial

import pytest

from chiasm.proxy.encode_plan import Entry
from chiasm.proxy.fleet import Fleet
from chiasm.proxy.instance import Instance
from chiasm.proxy.placement import Placed, Placement
from chiasm.proxy.prompts import Work
from chiasm.wire import Role

from ..regret import regret
from .placed_fleet import ENCODE, IMAGE_TOKENS, PER_TOKEN, PIXELS, add, costs, images, text

TEMPLATE_TOKENS = 16
STREAM_SLOWS = 0.03


class PD:
    """Computes prompts piece by piece, those that are due first; an image's piece needs its embedding."""

    def __init__(self, instance: Instance, speed: float) -> None:
        self.instance = instance
        self.speed = speed
        self.prompts: list[Running] = []
        self.streams = 0
        self.busy = False
        self.cached: set[int] = set()


class Running:
    """One request."""

    def __init__(self, number: int, placed: Placed, pd: PD) -> None:
        self.number = number
        self.placed = placed
        work = placed.prompt.work
        cached = max((n for n, one in enumerate(work.prefixes, 1) if one.key in pd.cached), default=0)
        self.missing = {item.identifier for item in work.items[cached:]}
        self.pieces = [(item.identifier, item.pixels / PIXELS * IMAGE_TOKENS) for item in work.items[cached:]]
        self.pieces.append(("", work.text_bytes / 4 + TEMPLATE_TOKENS))
        pd.cached |= {one.key for one in work.prefixes}


class Simulation:
    """Runs requests through a fleet; ``first_tokens`` has the seconds from arrival to the first token of each."""

    def __init__(
        self, pds: dict[str, float], encoders: dict[str, float], *, forced: dict[int, str] | None = None
    ) -> None:
        """``pds`` and ``encoders`` have true speeds by name; all report that they are of speed 1."""
        self.fleet = Fleet()
        self.placement = Placement(self.fleet)
        self.pds = {add(self.fleet, name, known=costs()): speed for name, speed in pds.items()}
        self.machines = {instance: PD(instance, speed) for instance, speed in self.pds.items()}
        self.encoders = {add(self.fleet, name, Role.ENCODER, known=costs()): speed for name, speed in encoders.items()}
        self.free_at = dict.fromkeys(self.encoders, 0.0)
        self.encoded_by: list[str] = []
        self.first_tokens: list[float] = []
        self.places: list[str] = []
        self._forced = forced or {}
        self._running: list[Running] = []
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._numbers = itertools.count()

    def run(self, requests: list[Work]) -> Simulation:
        self.first_tokens = [float("inf")] * len(requests)
        self.places = [""] * len(requests)
        for number, work in enumerate(requests):
            self._at(work.arrival, partial(self._arrive, number, work))
        while self._events:
            now, _, event = heapq.heappop(self._events)
            event(now)
        return self

    def throttle(self, name: str, speed: float, when: float) -> None:
        """Let an encoder be of this speed from then on."""
        encoder = next(one for one in self.encoders if one.url == f"http://{name}")
        self._at(when, lambda now: self.encoders.update({encoder: speed}))

    def _at(self, when: float, event: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), event))

    def _arrive(self, number: int, work: Work, now: float) -> None:
        wanted = self._forced.get(number)
        others = {one for one in self.pds if wanted is not None and one.url != f"http://{wanted}"}
        placed = self.placement.place(work, (Role.PD,), now, exclude=others)
        assert placed is not None
        with self.fleet.working(placed.instance, 1.0):
            pass
        machine = self.machines[placed.instance]
        running = Running(number, placed, machine)
        self._running.append(running)
        self.places[number] = placed.instance.url.removeprefix("http://")
        machine.prompts.append(running)
        self.placement.queue(placed, work.items)
        self._feed(now)
        self._compute(machine, now)

    def _feed(self, now: float) -> None:
        for feed in self.placement.images.feed(now):
            encoder, start = feed.encoder, max(now, self.free_at[feed.encoder])
            seconds = sum(entry.seconds and ENCODE * entry.item.pixels / PIXELS for entry in feed.entries)
            seconds /= self.encoders[encoder]
            self.free_at[encoder] = start + seconds
            self.encoded_by += [encoder.url.removeprefix("http://")] * len(feed.entries)
            self._at(start + seconds, partial(self._encoded, feed.entries, seconds))

    def _encoded(self, entries: list[Entry], seconds: float, now: float) -> None:
        self.placement.images.finish(entries, now, seconds=seconds or None)
        names = {entry.item.identifier for entry in entries}
        for running in self._running:
            running.missing -= names
            if not running.missing:
                self.placement.embedded(running.placed)
        self._feed(now)
        for machine in self.machines.values():
            self._compute(machine, now)

    def _compute(self, machine: PD, now: float) -> None:
        if machine.busy:
            return
        ready = [one for one in machine.prompts if one.pieces[0][0] not in one.missing]
        if not ready:
            return
        running = min(ready, key=lambda one: one.placed.prompt.due)
        _, tokens = running.pieces.pop(0)
        machine.busy = True
        seconds = tokens * PER_TOKEN / machine.speed * (1 + STREAM_SLOWS * machine.streams)
        self._at(now + seconds, lambda now: self._computed(machine, running, tokens, seconds, now))

    def _computed(self, machine: PD, running: Running, tokens: float, seconds: float, now: float) -> None:
        machine.busy = False
        if not running.pieces:
            placed = running.placed
            machine.prompts.remove(running)
            self._running.remove(running)
            self.first_tokens[running.number] = now - placed.prompt.work.arrival
            self.placement.first_token(placed, now)
            placed.instance.costs.learn_prefill(tokens, seconds, now)
            machine.streams += 1
            self._at(now + 1.0, lambda now: self._end(machine, placed, now))
        self._compute(machine, now)

    def _end(self, machine: PD, placed: Placed, now: float) -> None:
        machine.streams -= 1
        self.placement.end(placed, now)


def mixed(count: int, seconds_between: float, seed: int) -> list[Work]:
    """Return requests like those of a chat: most have text only, the others one to four images of two sizes."""
    chance = random.Random(seed)
    requests: list[Work] = []
    now = 0.0
    for number in range(count):
        now += chance.expovariate(1 / seconds_between)
        tokens = chance.choice((50, 200, 800))
        if chance.random() < 0.6:
            requests.append(text(tokens, now))
        else:
            names = [f"{number}-{index}" for index in range(chance.choice((1, 1, 1, 2, 4)))]
            requests.append(images(*names, pixels=chance.choice((PIXELS // 4, PIXELS)), tokens=tokens, arrival=now))
    return requests


def regret_of(seconds_between: float, seed: int) -> float:
    pds, encoders = {"a": 1.0, "b": 1.0, "c": 2.0}, {"x": 1.0, "y": 2.0, "z": 0.5}
    warm_up, count = 30, 40
    requests = mixed(warm_up + count, seconds_between, seed)
    places = Simulation(pds, encoders).run(requests).places

    def first_tokens(count: int, forced: dict[int, str]) -> list[float]:
        return Simulation(pds, encoders, forced=forced).run(requests[:count]).first_tokens

    return regret(first_tokens, places, pds, warm_up=warm_up)


def mean_regret(seconds_between: float) -> float:
    # The weights in placement.py were chosen with the seeds 7 and 8, so they aren't judged by them.
    regrets = [regret_of(seconds_between, seed) for seed in (21, 22, 23, 24)]
    return sum(regrets) / len(regrets)


@pytest.mark.parametrize("seconds_between", [1.0, 0.3])
def test_mean_regret_is_at_most_five_percent_up_to_four_tenths_of_what_the_pds_can_do(seconds_between: float) -> None:
    assert mean_regret(seconds_between) <= 0.05


def test_mean_regret_is_at_most_fifteen_percent_at_eight_tenths() -> None:
    """More than at lower load: what is computed before a request is known less exactly the more there is of it."""
    assert mean_regret(0.15) <= 0.15


def test_a_throttled_encoder_is_found_out_within_twenty_items() -> None:
    requests = [images(str(n), arrival=n * 0.4, tokens=20) for n in range(60)]
    simulation = Simulation({"a": 1.0}, {"good": 1.0, "throttled": 0.2}).run(requests)
    throttled = next(one for one in simulation.encoders if one.url == "http://throttled")
    assert simulation.encoded_by[:20].count("throttled") <= 10
    assert simulation.encoded_by[20:].count("throttled") <= 8
    assert throttled.costs.encode_seconds(PIXELS, requests[-1].arrival) > 2.5 * ENCODE


def test_an_encoder_that_was_throttled_gets_its_share_again_within_twenty_items() -> None:
    requests = [images(str(n), arrival=n * 0.4, tokens=20) for n in range(120)]
    simulation = Simulation({"a": 1.0}, {"good": 1.0, "throttled": 0.2})
    simulation.throttle("throttled", 1.0, requests[60].arrival)
    simulation.run(requests)
    assert simulation.encoded_by[80:].count("throttled") >= 15


def test_nobody_starves_under_a_stream_of_small_requests() -> None:
    """One request with a large image comes among small ones that alone keep all busy."""
    small = [images(f"s{n}", pixels=PIXELS // 4, tokens=20, arrival=n * 0.126) for n in range(400)]
    large = images("large", pixels=4 * PIXELS, tokens=2000, arrival=1.0)
    requests = sorted([*small, large], key=lambda one: one.arrival)
    simulation = Simulation({"a": 1.0}, {"x": 1.0}).run(requests)
    assert simulation.first_tokens[requests.index(large)] < 35


def test_repeats_are_answered_where_their_beginning_is_cached() -> None:
    chance = random.Random(3)
    requests = [images(f"i{chance.randrange(6)}", tokens=50, arrival=float(n)) for n in range(60)]
    simulation = Simulation({"a": 1.0, "b": 1.0}, {"x": 10.0}).run(requests)
    homes: dict[str, set[str]] = {}
    for work, place in zip(requests, simulation.places, strict=True):
        homes.setdefault(work.items[0].identifier, set()).add(place)
    assert all(len(places) == 1 for places in homes.values())
