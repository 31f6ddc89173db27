"""A simulation of several proxies in front of the same language instances. No network, and no real time.

Prompts of text come at random, and are placed by the code that the proxies run. Only the instances are played: each computes
one prompt after the other, first what is due first, and tells its load to each proxy at intervals, as leases do.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from chiasm.bench.simulated_time import SimulatedTime
from chiasm.proxy.fleet import Fleet
from chiasm.proxy.placement import Placed, Placement
from chiasm.proxy.prompts import Work
from chiasm.wire import Costs, Health, Load, Role

PER_TOKEN = 0.001
"""Seconds to prefill a token."""
_BYTES_PER_TOKEN = 4
_LONGEST = 20
"""The longest prompt, in multiples of the mean."""
_ROLES = (Role.PD,)


@dataclass(frozen=True)
class Prompt:
    """A prompt that comes."""

    arrival: float
    tokens: int


@dataclass(frozen=True)
class _Given:
    """A prompt at an instance."""

    prompt: Prompt
    placed: Placed
    proxy: _Proxy


class _Proxy:
    """One proxy, which knows of the others what instances tell."""

    def __init__(self, instances: int) -> None:
        self.fleet = Fleet()
        self.placement = Placement(self.fleet)
        for index in range(instances):
            instance = self.fleet.add(f"http://pd-{index}", Role.PD)
            self.fleet.succeed(instance, _health(None))


class _Machine:
    """One instance."""

    def __init__(self) -> None:
        self.queue: list[tuple[float, int, _Given]] = []
        self.computing: _Given | None = None
        self.ends_at = 0.0

    def outstanding_seconds(self, now: float) -> float:
        waiting = sum(given.prompt.tokens for _, _, given in self.queue) * PER_TOKEN
        return waiting + (max(0.0, self.ends_at - now) if self.computing else 0.0)


def _health(load: Load | None) -> Health:
    return Health(role=Role.PD, model="simulated", costs=Costs(prefill_seconds_per_token=PER_TOKEN), load=load)


class PromptSimulation:
    """Prompts come to the proxies in turn."""

    def __init__(self, instances: int, *, proxies: int, report_seconds: float | None, last_report: float = math.inf):
        """Each instance tells its load every ``report_seconds`` until ``last_report``; never, if the former is None."""
        self._proxies = [_Proxy(instances) for _ in range(proxies)]
        self._machines = [_Machine() for _ in range(instances)]
        self._report_seconds = report_seconds
        self._last_report = last_report
        self._time = SimulatedTime()
        self._numbers = itertools.count()
        self._seconds: list[float] = []

    def run(self, prompts: Sequence[Prompt]) -> list[float]:
        """Return the seconds from the arrival of each prompt until its first token."""
        for number, prompt in enumerate(prompts):
            self._time.at(prompt.arrival, partial(self._arrive, self._proxies[number % len(self._proxies)], prompt))
        if self._report_seconds is not None:
            self._report_until(min(self._last_report, prompts[-1].arrival), self._report_seconds)
        self._time.run()
        return self._seconds

    def _report_until(self, end: float, every: float) -> None:
        pairs = list(itertools.product(range(len(self._machines)), self._proxies))
        for number, (index, proxy) in enumerate(pairs):
            for turn in range(math.ceil(end / every)):
                self._time.at((turn + number / len(pairs)) * every, partial(self._report, index, proxy))

    def _report(self, index: int, proxy: _Proxy) -> None:
        instance = proxy.fleet.instances[index]
        load = Load(outstanding_seconds=self._machines[index].outstanding_seconds(self._time.now))
        proxy.fleet.succeed(instance, _health(load))
        proxy.placement.note_load(instance, self._time.now)

    def _arrive(self, proxy: _Proxy, prompt: Prompt) -> None:
        placed = proxy.placement.place(Work(self._time.now, _BYTES_PER_TOKEN * prompt.tokens), _ROLES, self._time.now)
        assert placed is not None
        with proxy.fleet.working(placed.instance, 0.0):  # so that equals take turns
            pass
        machine = self._machines[proxy.fleet.instances.index(placed.instance)]
        heapq.heappush(machine.queue, (placed.prompt.due, next(self._numbers), _Given(prompt, placed, proxy)))
        self._work(machine)

    def _work(self, machine: _Machine) -> None:
        if machine.computing is not None or not machine.queue:
            return
        _, _, given = heapq.heappop(machine.queue)
        seconds = given.prompt.tokens * PER_TOKEN
        machine.computing, machine.ends_at = given, self._time.now + seconds
        self._time.at(machine.ends_at, partial(self._end, machine, given, seconds))

    def _end(self, machine: _Machine, given: _Given, seconds: float) -> None:
        machine.computing = None
        self._seconds.append(self._time.now - given.prompt.arrival)
        placement = given.proxy.placement
        placement.first_token(given.placed, self._time.now, prefill_seconds=seconds, prompt_tokens=given.prompt.tokens)
        placement.end(given.placed, self._time.now)
        self._work(machine)


def prompts(count: int, *, mean_seconds: float, rate: float, seed: int) -> list[Prompt]:
    """Return prompts of very different lengths (log-normal) at random times, ``rate`` a second on average."""
    chance = random.Random(seed)
    mean_tokens = mean_seconds / PER_TOKEN
    found: list[Prompt] = []
    now = 0.0
    for _ in range(count):
        now += chance.expovariate(rate)
        tokens = mean_tokens * min(_LONGEST, chance.lognormvariate(-0.5, 1.0))
        found.append(Prompt(now, max(1, round(tokens))))
    return found
