"""What a single request with one or several images takes until its first token on an idle machine, in several topologies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from chiasm.bench import requests
from chiasm.bench.checkpoints import SIDE, Alone, measure_alone, synthetic
from chiasm.bench.load import stream_in_turns
from chiasm.bench.measurement import Bench, Figure, Measurement, Outcome, Panel, Series
from chiasm.bench.requests import Texts, photo
from chiasm.bench.statistics import median, paired_ratio
from chiasm.bench.topology import aggregated, colocated, encoder_and_pds, running
from chiasm.cores import usable_cores
from chiasm.launch import Deployment

_AT_MOST = {1: 1.05, 4: 1.0, 8: 1.0}
"""Targets of colocated / aggregated by number of images."""
_WARM_UP = 3
_TEXT_TOKENS = 64
_AGGREGATED, _COLOCATED, _SPLIT, _HALF = "aggregated", "colocated", "E+PD", "aggregated on half"
_FIELDS: dict[str, Any] = {"max_tokens": 2, "stream": True}


@dataclass(frozen=True)
class _Kind:
    """Requests that differ only in what their images or texts show."""

    name: str
    images: int
    body_of: Callable[[int], bytes]
    """Gives the body of a round."""


class Ttft(Measurement):
    """Images, and a text for comparison, to instances that share all cores, to a split, and to one aggregated instance."""

    name = "ttft"
    purpose = "Time to first token of images on an idle machine: colocated against aggregated, both with all cores"
    target = f"at most {_AT_MOST[1]} times aggregated for one image, {_AT_MOST[4]:.1f} times for four and eight"

    async def run(self, bench: Bench) -> Outcome:
        outcome = Outcome()
        await _compare(bench, outcome, bench.model_name, bench.model, numbers=(1,))
        await _compare(bench, outcome, "synthetic", await synthetic(bench), numbers=tuple(_AT_MOST))
        outcome.notes += [
            "The synthetic checkpoint turns an image into 256 tokens; other checkpoints may scale it down first.",
            "Bounds: a pipeline takes e + p + (n-1) max(e, p), and all cores, if always busy, n (e + p) / 2, where e and p are "
            "encode and prefill of one image with half of the cores.",
        ]
        return outcome


async def _compare(bench: Bench, outcome: Outcome, label: str, model: str, *, numbers: tuple[int, ...]) -> None:
    """Measure requests with these ``numbers`` of images, with bounds if there are several, and a text."""
    topologies = {
        _AGGREGATED: aggregated(model, threads=usable_cores()),
        _COLOCATED: colocated(model),
        _SPLIT: encoder_and_pds(model),
        _HALF: aggregated(model),
    }
    async with running(bench, *topologies.values()) as started:
        deployments = dict(zip(topologies, started, strict=True))
        for kind in _kinds(bench, label, Texts(started[0].folder, bench.seed), numbers):
            # Those with half of the cores show what another process costs by itself; one image is enough for that.
            chosen = {name: one for name, one in deployments.items() if name != _HALF or kind.images <= 1}
            has_bounds = kind.images > 0 and len(numbers) > 1
            alone = await _alone(bench, deployments[_SPLIT], f"{label} {kind.name}") if has_bounds else []
            taken = await _taken(bench, label, kind, chosen)
            _add(outcome, f"{label}, {kind.name}", kind.images, taken, bench.seed)
            if alone:
                _add_bounds(outcome, f"{label}, {kind.name}", kind.images, alone, taken[_COLOCATED])


def _kinds(bench: Bench, label: str, texts: Texts, numbers: tuple[int, ...]) -> list[_Kind]:
    def of_images(number: int) -> _Kind:
        def body_of(index: int) -> bytes:
            name = f"ttft {bench.seed} {label} {number} {index}"
            return requests.ask([photo(f"{name} {place}", SIDE) for place in range(number)], **_FIELDS)

        return _Kind("1 image" if number == 1 else f"{number} images", number, body_of)

    text = _Kind("text", 0, lambda index: requests.chat(texts.of(_TEXT_TOKENS), **_FIELDS))
    return [*map(of_images, numbers), text]


async def _taken(bench: Bench, label: str, kind: _Kind, deployments: dict[str, Deployment]) -> dict[str, list[float]]:
    """Return milliseconds to the first token, by topology."""
    several = kind.images > 1
    rounds, warm_up = (bench.samples(12, quick=2), 1) if several else (bench.samples(60, quick=3), _WARM_UP)
    bench.phase(f"{label}, {kind.name}", rounds + warm_up)
    urls = [deployment.url for deployment in deployments.values()]
    answers = await stream_in_turns(bench, urls, kind.body_of, rounds=rounds, warm_up=warm_up)
    return {
        name: [1000 * answer.ttft_seconds for answer in given] for name, given in zip(deployments, answers, strict=True)
    }


async def _alone(bench: Bench, split: Deployment, name: str) -> list[Alone]:
    """Return what one image takes an encoder and a PD with half of the cores each, while nothing else runs."""
    rounds = bench.samples(12, quick=2)
    bench.phase("one image alone", rounds + 1)
    found = []
    for index in range(rounds + 1):
        found.append(await measure_alone(bench, split, f"ttft {bench.seed} {name} alone {index}"))
        bench.advance()
    return found[1:]


def _add(outcome: Outcome, name: str, images: int, taken: dict[str, list[float]], seed: int) -> None:
    """Add the ratios, the medians and the panel of one kind of requests."""
    limit = _AT_MOST.get(images)
    for baseline, other in ((_AGGREGATED, _COLOCATED), (_AGGREGATED, _SPLIT), (_HALF, _SPLIT)):
        if baseline in taken:
            ratio = paired_ratio(taken[baseline], taken[other], seed=seed)
            at_most = limit if other == _COLOCATED else None
            outcome.figures.append(Figure.of(f"{name}: {other} / {baseline}", ratio, "x", at_most=at_most))
    outcome.figures += [Figure(f"{name}: {one}, median", median(values), "ms") for one, values in taken.items()]
    targets = {} if limit is None else {_COLOCATED: limit * median(taken[_AGGREGATED])}
    series = [Series(one, values, targets.get(one)) for one, values in taken.items()]
    outcome.panels.append(Panel(f"ttft: {name}", "ms", series))


def _add_bounds(outcome: Outcome, name: str, images: int, alone: list[Alone], taken: list[float]) -> None:
    """Add what a split and a colocated deployment would take at best; ``taken`` are milliseconds of the latter."""
    pipeline = 1000 * median([one.pipelined(images) for one in alone])
    busy = 1000 * median([one.all_busy(images) for one in alone])
    outcome.figures += [
        Figure(f"{name}: bound of a pipeline", pipeline, "ms"),
        Figure(f"{name}: bound with all cores busy", busy, "ms"),
        Figure(f"{name}: colocated / bound with all cores busy", median(taken) / busy, "x"),
    ]
