"""What is lost and saved by encoders that come and go by what is needed, when a burst comes: simulated, and in truth."""

from __future__ import annotations

import asyncio
import random

from chiasm.bench.burst import Ridden, Wave, ride
from chiasm.bench.measurement import Bench, Figure, Measurement, Outcome, Panel, Series
from chiasm.bench.scaling import Fleet, Scaled, ScalingSimulation, images_of, lone_requests
from chiasm.bench.statistics import median

_LEAST, _MOST = 1, 4
_HALF_HOUR = Wave(seconds=1800.0, burst_at=300.0)
_LOAD, _HIGHER_LOAD = 0.2, 0.3
_START_SECONDS = 1.5
"""What a fork of the demo took on two cores of a CPU, half busy."""
_SLOW_START_SECONDS = 30.0
_LONE_SECONDS, _LONE_IMAGES = 60.0, 8
_SEEDS = 3
_POINTS = 3.0
_FEWER = 40.0
_REAL, _QUICK = (
    Wave(seconds=150.0, burst_at=30.0, burst_seconds=30.0),
    Wave(seconds=12.0, burst_at=3.0, burst_seconds=4.0),
)
_REAL_RATE = 4.0
_REAL_CALM_SECONDS = 20.0
_QUICK_CALM_SECONDS = 5.0
_SHOWN = 5


class Scaling(Measurement):
    """The simulated figures are the same on every machine."""

    name = "scaling"
    purpose = (
        "Ten times as many images for 30 s: encoders that come and go, beside the largest number held all the time"
    )
    target = f"at most {_POINTS:g} points fewer in time, at least {_FEWER:g} % fewer encoder-seconds; none fails"

    async def run(self, bench: Bench) -> Outcome:
        outcome = Outcome()
        bench.phase("simulating")
        await asyncio.to_thread(_simulate, outcome, bench.seed, bench.samples(_SEEDS, quick=1))
        await _in_truth(outcome, bench)
        return outcome


# ---- simulated -----------------------------------------------------------------------------------------------------------


def _simulate(outcome: Outcome, seed: int, patterns: int) -> None:
    seeds = [seed + number for number in range(patterns)]
    held = [_run(Fleet(_MOST, _MOST), _LOAD, one) for one in seeds]
    scaled = [_run(Fleet(_LEAST, _MOST, _START_SECONDS), _LOAD, one) for one in seeds]
    _compare(outcome, "simulated", held, scaled, is_target=True)
    held = [_run(Fleet(_MOST, _MOST), _HIGHER_LOAD, one) for one in seeds]
    scaled = [_run(Fleet(_LEAST, _MOST, _START_SECONDS), _HIGHER_LOAD, one) for one in seeds]
    _compare(outcome, f"simulated, calm load {_HIGHER_LOAD:g}", held, scaled)
    held = [_run(Fleet(_MOST, _MOST), _LOAD, one) for one in seeds]
    scaled = [_run(Fleet(_LEAST, _MOST, _SLOW_START_SECONDS), _LOAD, one) for one in seeds]
    _compare(outcome, f"simulated, a start takes {_SLOW_START_SECONDS:g} s", held, scaled)
    lone = ScalingSimulation(Fleet(_LEAST, _MOST, _START_SECONDS)).follow(
        lone_requests(_HALF_HOUR.seconds, _LONE_SECONDS, _LONE_IMAGES, seed), _HALF_HOUR.seconds
    )
    outcome.figures.append(
        Figure(
            f"simulated, a request of {_LONE_IMAGES} images each minute: most encoders",
            max(one.encoders for one in lone.changes),
            at_most=_LEAST,
        )
    )
    outcome.parameters |= {"calm load": _LOAD, "start seconds": _START_SECONDS, "range": [_LEAST, _MOST]}
    outcome.notes.append(
        f"Simulated: {_HALF_HOUR.seconds / 60:g} minutes in which a calm stream keeps {_LOAD:g} encoders busy, with one burst; "
        f"{_LEAST} to {_MOST} encoders, which start within {_START_SECONDS:g} s; {patterns} pattern(s). An image is in time if "
        "it is encoded within five times what that takes alone."
    )


def _run(fleet: Fleet, load: float, seed: int) -> Scaled:
    return ScalingSimulation(fleet).follow(images_of(_HALF_HOUR, load, seed), _HALF_HOUR.seconds)


def _compare(
    outcome: Outcome, label: str, held: list[Scaled], scaled: list[Scaled], *, is_target: bool = False
) -> None:
    lost = [100 * (one.in_time() - other.in_time()) for one, other in zip(held, scaled, strict=True)]
    fewer = [100 * (1 - other.encoder_seconds / one.encoder_seconds) for one, other in zip(held, scaled, strict=True)]
    limit, least = (_POINTS, _FEWER) if is_target else (None, None)
    outcome.figures += [
        Figure(f"{label}: fewer in time, of all, median", median(lost), "points", at_most=limit),
        Figure(f"{label}: fewer encoder-seconds, median", median(fewer), "%", at_least=least),
        Figure(f"{label}: in time in the burst", 100 * median([one.in_time(_HALF_HOUR) for one in scaled]), "%"),
        Figure(f"{label}: the same with {_MOST} held", 100 * median([one.in_time(_HALF_HOUR) for one in held]), "%"),
    ]


# ---- in truth ------------------------------------------------------------------------------------------------------------


async def _in_truth(outcome: Outcome, bench: Bench) -> None:
    wave, calm_seconds = (_QUICK, _QUICK_CALM_SECONDS) if bench.quick else (_REAL, _REAL_CALM_SECONDS)
    times = wave.times(_REAL_RATE, random.Random(bench.seed))
    ridden = {
        least: await ride(
            bench,
            bench.model,
            times,
            seconds=wave.seconds,
            encoders=(least, _MOST),
            calm_seconds=calm_seconds,
        )
        for least in (_MOST, _LEAST)
    }
    held, scaled = ridden[_MOST], ridden[_LEAST]
    in_burst = [wave.is_in_burst(when) for when in times]
    failures = held.failures + scaled.failures
    fewer = 100 * (1 - scaled.encoder_seconds / held.encoder_seconds)
    outcome.figures += [
        Figure("here: requests that failed", len(failures), at_most=0),
        Figure("here: requests", len(times)),
        Figure("here: fewer in time, of all", 100 * (held.in_time() - scaled.in_time()), "points", at_most=_POINTS),
        Figure("here: fewer encoder-seconds", fewer, "%", at_least=None if bench.quick else _FEWER),
        Figure("here: in time in the burst", 100 * scaled.in_time(in_burst), "%"),
        Figure(f"here: the same with {_MOST} held", 100 * held.in_time(in_burst), "%"),
        Figure("here: most encoders at one time", scaled.most),
    ]
    if scaled.start_seconds:
        outcome.figures.append(Figure("here: start of an encoder", 1000 * median(scaled.start_seconds), "ms"))
    outcome.panels.append(
        Panel(
            "scaling: first tokens here",
            "ms",
            [_series(scaled, f"{_LEAST} to {_MOST}"), _series(held, f"{_MOST} held")],
        )
    )
    outcome.notes += [f"A request failed: {message}" for message in failures[:_SHOWN]]
    outcome.notes.append(
        f"Here: `serve --layout colocated --encoders {_LEAST}..{_MOST} --pds 1` with {_REAL_RATE:g} requests a second, an "
        f"image each, and ten times as many for {wave.burst_seconds:g} of {wave.seconds:g} s; fewer encoders after "
        f"{calm_seconds:g} s. A first token is in time within {1000 * scaled.limit_seconds:.0f} ms with {_LEAST} to "
        f"{_MOST} encoders, {1000 * held.limit_seconds:.0f} ms with {_MOST}: five times what it takes alone."
    )


def _series(ridden: Ridden, label: str) -> Series:
    return Series(label, [1000 * one for one in ridden.ttft_seconds if one is not None])
