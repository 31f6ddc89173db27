"""Whether anything grows while clients of all kinds ask, and whether good ones get right answers beside the others."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import psutil

from chiasm.bench import holdings
from chiasm.bench.client import RequestFailedError
from chiasm.bench.holdings import DESCRIPTORS, RESIDENT, SHARED, THREADS
from chiasm.bench.measurement import Bench, Curve, Figure, Measurement, Outcome, TimeLines
from chiasm.bench.requests import ask, draw_requests
from chiasm.bench.statistics import median, quantile
from chiasm.bench.strangers import ACTS, Target, perform
from chiasm.bench.topology import prefill_and_decode, running
from chiasm.bench.trend import growth
from chiasm.errors import ChiasmError, ConfigurationError
from chiasm.launch import Deployment
from chiasm.prometheus import total

_MINUTES, _QUICK_MINUTES = 5.0, 0.2
_SAMPLES = 300
_LEAST_SECONDS_BETWEEN_SAMPLES = 0.2
_NUMBERS = {"good": 2, "new": 2, "slow": 4, "leaving": 2, "hostile": 2}
"""Of clients of each kind at the same time."""
_PAUSE_SECONDS = 0.2
"""Mean time between two acts of a client that is not good."""
_REQUESTS, _QUICK_REQUESTS = 40, 6
_TOKENS = 24
_LEASES = "leases"
_MIB = 1 << 20
_TOLERANCES = {RESIDENT: 8 * _MIB, DESCRIPTORS: 4, THREADS: 2, SHARED: 2 * _MIB, _LEASES: 2}
"""Growth within the last half that is no growth."""
_RELATIVE_TOLERANCE = 0.02
"""The same, as a share of what there is."""
_MACHINE = "/dev/shm"
_CACHES = {"kv_cache_bytes": 64 << 20, "encoder_cache_bytes": 4 << 20}
_STORE_BYTES = 8 << 20
"""Small, so that all caches are full in the first half."""
_CALM_SECONDS = 60.0
"""Time for what the last clients left behind to end: longer than a lease."""


@dataclass
class _Series:
    """What one process holds of one thing, over time."""

    points: list[tuple[float, float]] = field(default_factory=list)
    """Minutes since the beginning, and bytes or a count."""

    @property
    def last_half(self) -> list[float]:
        """The values of the last half."""
        half = self.points[-1][0] / 2
        return [value for minutes, value in self.points if minutes >= half]


Found = dict[tuple[str, str], _Series]
"""By what is held and who holds it."""


class Soak(Measurement):
    """Good, slow, leaving and hostile clients all ask for minutes, and what each process holds is read meanwhile."""

    name = "soak"
    purpose = "Memory, descriptors, threads and leases of every process, while good and bad clients ask for minutes"
    target = "all flat in the last half; good clients are answered as before"
    only_by_name = True

    async def run(self, bench: Bench) -> Outcome:
        minutes = bench.soak.minutes or (_QUICK_MINUTES if bench.quick else _MINUTES)
        outcome = Outcome(parameters={"minutes": minutes, "clients": _NUMBERS})
        async with _watched(bench) as watched:
            good = _Good(bench, watched.target)
            await good.learn()
            bench.phase("clients of all kinds", round(60 * minutes))
            found: Found = {}
            counts: dict[str, Counter[str]] = {kind: Counter() for kind in _NUMBERS}
            everybody = [
                good.ask_on(number)
                if kind == "good"
                else _go_on(kind, watched.target, counts[kind], bench.seed + number)
                for kind, clients in _NUMBERS.items()
                for number in range(clients)
            ]
            clients = [asyncio.create_task(one) for one in everybody]
            try:
                await _sample(bench, watched, found, minutes, clients)
            finally:
                for task in clients:
                    task.cancel()
                await asyncio.gather(*clients, return_exceptions=True)
            left = await _left_behind(bench, watched)
        counts["good"] = good.counts
        _judge(outcome, found, good, counts, left)
        outcome.trials = [{"client": kind, "answers": dict(one)} for kind, one in counts.items()]
        return outcome


# ---- what is watched ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Watched:
    target: Target
    pids: Mapping[str, int]
    """Of the proxy and of the instances, by name."""
    instances: Mapping[str, str]
    """URLs by name."""


@asynccontextmanager
async def _watched(bench: Bench) -> AsyncIterator[_Watched]:
    if bench.soak.url is not None:
        yield await _at(bench, bench.soak.url.rstrip("/"))
        return
    config = prefill_and_decode(bench.model)
    config = replace(config, settings={**config.settings, **_CACHES}, ec_max_bytes=_STORE_BYTES)
    async with running(bench, config) as (deployment,):
        yield await _at(bench, deployment.local_url, _names(deployment))


def _names(deployment: Deployment) -> dict[str, str]:
    return {one.url: one.name.removesuffix("-0") for one in deployment.processes}


async def _at(bench: Bench, url: str, names: Mapping[str, str] | None = None) -> _Watched:
    """Find the processes of a proxy and of its instances on this machine. Raises ConfigurationError."""
    health = await bench.client.proxy_health(url)
    if not health.models:
        raise ConfigurationError(f"{url} has no model yet; wait until its /health is ok.")
    known = await asyncio.to_thread(holdings.listeners)
    pids: dict[str, int] = {}
    instances: dict[str, str] = {}
    numbers: Counter[str] = Counter()
    for place, role in ((url, "proxy"), *((one.url, one.role) for one in health.instances)):
        name = (names or {}).get(place) or (role if role == "proxy" else f"{role}-{numbers[role]}")
        numbers[role] += 1
        if role != "proxy":
            instances[name] = place
        if (pid := holdings.pid_at(place, known)) is not None:
            pids[name] = pid
    if "proxy" not in pids:
        raise ConfigurationError(f"No process of yours listens at {url} on this machine, so there is nothing to watch.")
    return _Watched(Target(url, health.models[0]), pids, instances)


async def _sample(
    bench: Bench, watched: _Watched, found: Found, minutes: float, clients: Sequence[asyncio.Task[None]]
) -> None:
    """Read what all processes hold, until the time is over. Raises the error of a client that ends."""
    between = max(_LEAST_SECONDS_BETWEEN_SAMPLES, 60 * minutes / _SAMPLES)
    started = time.monotonic()
    shown = 0
    while (now := time.monotonic() - started) < 60 * minutes:
        for place, value in (await _read(bench, watched)).items():
            found.setdefault(place, _Series()).points.append((now / 60, value))
        for _ in range(shown, int(now)):
            bench.advance()
        shown = int(now)
        for task in clients:
            if task.done():
                task.result()
        await asyncio.sleep(between)


async def _read(bench: Bench, watched: _Watched) -> dict[tuple[str, str], float]:
    """Return what is held, by what and by whom. Raises ChiasmError if a process is gone."""
    found: dict[tuple[str, str], float] = {}
    for name, pid in watched.pids.items():
        try:
            held = await asyncio.to_thread(holdings.held_by, pid)
        except psutil.Error:
            raise ChiasmError(f"{name} has ended; its log says why.") from None
        found |= {(what, name): value for what, value in held.items()}
    if (shared := holdings.shared_folder_bytes()) is not None:
        found[SHARED, _MACHINE] = shared
    for name, value in (await _of_instances(bench, watched, "chiasm_kv_leases_held")).items():
        found[_LEASES, name] = value
    return found


async def _of_instances(bench: Bench, watched: _Watched, metric: str) -> dict[str, float]:
    """Return a metric of the instances that have it."""
    found: dict[str, float] = {}
    for name, url in watched.instances.items():
        with contextlib.suppress(OSError, TimeoutError):  # an instance that is busy is asked again at the next sample
            value = total(await bench.client.metrics(url), metric)
            if value is not None:
                found[name] = value
    return found


async def _left_behind(bench: Bench, watched: _Watched) -> dict[str, float]:
    """Return what instances still hold for clients that are gone, as soon as it is nothing, or after a while."""
    bench.phase("waiting for what clients left behind")
    until = time.monotonic() + _CALM_SECONDS
    while True:
        left = {
            what: sum((await _of_instances(bench, watched, metric)).values())
            for what, metric in (
                ("leases", "chiasm_kv_leases_held"),
                ("requests in engines", "chiasm_requests_running"),
                ("KV blocks in use", "chiasm_kv_blocks_used"),
            )
        }
        if not any(left.values()) or time.monotonic() > until:
            return left
        await asyncio.sleep(0.5)


# ---- clients -----------------------------------------------------------------------------------------------------------


class _Good:
    """Clients that ask what they asked before, and know the answer."""

    def __init__(self, bench: Bench, target: Target) -> None:
        self._bench = bench
        self._target = target
        self._answers: dict[bytes, str] = {}
        self.counts: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        """What clients were told instead of an answer."""
        self.seconds: list[float] = []

    async def learn(self) -> None:
        """Ask everything once, while nobody else asks. Raises RequestFailedError."""
        number = _QUICK_REQUESTS if self._bench.quick else _REQUESTS
        self._bench.phase("learning the answers", number)
        for index, drawn in enumerate(draw_requests(self._bench.seed, number)):
            fields = {"model": self._target.model, "stream": True, "ignore_eos": index % 2 == 1}
            body = ask(drawn.images, drawn.question, max_tokens=_TOKENS, **fields)
            self._answers[body] = await self._ask(body)
            self._bench.advance()

    async def ask_on(self, seed: int) -> None:
        """Ask again and again, in a random order."""
        generator = random.Random(f"good {self._bench.seed} {seed}")
        while True:
            body = generator.choice(list(self._answers))
            started = time.monotonic()
            try:
                answer = await self._ask(body)
            except RequestFailedError as error:
                self.counts["failed"] += 1
                self.failures[error.message] += 1
                await asyncio.sleep(_PAUSE_SECONDS)
            else:
                self.seconds.append(time.monotonic() - started)
                self.counts["right" if answer == self._answers[body] else "wrong"] += 1

    async def _ask(self, body: bytes) -> str:
        return (await self._bench.client.chat(self._target.url, body)).text


async def _go_on(kind: str, target: Target, counts: Counter[str], seed: int) -> None:
    """Do what clients of a kind do, again and again."""
    generator = random.Random(f"{kind} {seed}")
    while True:
        statuses = await perform(generator.choice(ACTS[kind]), target, generator.getrandbits(32))
        for status in statuses or ():
            counts[str(status)] += 1
        counts["cut off" if statuses is None else "acts"] += 1
        await asyncio.sleep(generator.expovariate(1 / _PAUSE_SECONDS))


# ---- the result --------------------------------------------------------------------------------------------------------


def _judge(
    outcome: Outcome, found: Found, good: _Good, counts: Mapping[str, Counter[str]], left: Mapping[str, float]
) -> None:
    grew, unclear = [], False
    for (what, who), series in found.items():
        values = series.last_half
        grown, at_most = growth(values), max(_TOLERANCES[what], _RELATIVE_TOLERANCE * median(values))
        scale, unit = (1e6, "MB") if what in (RESIDENT, SHARED) else (1.0, "")
        if grown is not None:
            name = f"{who}: {what}, growth in the last half"
            outcome.figures.append(Figure(name, grown / scale, unit, at_most / scale))
        if what is RESIDENT:
            outcome.figures.append(Figure(f"{who}: {what}, median of the last half", median(values) / scale, unit))
        if grown is None:
            unclear = True
        elif grown > at_most:
            grew.append(f"{what} of {who} by {grown / scale:.3g} {unit}".rstrip())
    server_errors = sum(one["500"] for one in counts.values())
    outcome.figures += [
        Figure("good clients: wrong answers", good.counts["wrong"], "", 0),
        Figure("good clients: requests without an answer", good.counts["failed"], "", 0),
        Figure("good clients: right answers", good.counts["right"]),
        Figure("answers with status 500", server_errors, "", 0),
        *(Figure(f"{what} when all clients had left", number, "", 0) for what, number in left.items()),
    ]
    if good.seconds:
        for share in (0.5, 0.99):
            milliseconds = 1000 * quantile(good.seconds, share)
            outcome.figures.append(Figure(f"good clients: whole answer, p{100 * share:.0f}", milliseconds, "ms"))
    outcome.wrong = good.counts["wrong"] > 0
    if unclear:
        outcome.notes.append("There were too few samples to say whether all was flat: let it run longer.")
    else:
        outcome.notes.append(f"Grew in the last half: {'; '.join(grew)}." if grew else "All was flat in the last half.")
    outcome.notes += [
        f"{kind}: {', '.join(f'{number} × {what}' for what, number in sorted(one.items()))}."
        for kind, one in counts.items()
    ]
    outcome.notes += [f"A good client was told {number} times: {text}" for text, number in good.failures.most_common(3)]
    for what in dict.fromkeys(what for what, _ in found):
        unit, scale = ("MB", 1e6) if what in (RESIDENT, SHARED) else ("", 1.0)
        lines = [
            Curve(who, (), [(minutes, value / scale) for minutes, value in series.points])
            for (one, who), series in found.items()
            if one == what
        ]
        outcome.panels.append(TimeLines(f"soak: {what}", "minutes", unit, lines))
