"""What requests take when nothing else runs, and the limits that follow from it. Nothing here sends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from chiasm.bench.goodput import TARGET, Limits
from chiasm.bench.goodput_options import GoodputOptions
from chiasm.bench.statistics import median
from chiasm.bench.traffic import Shape, Traffic

UNLOADED_TOKENS = 8
"""Of the answers by which times per token are taken."""
_LEAST_TPOT_SECONDS = 0.01
"""No lower limit is set by a factor, since tokens that are faster arrive several at a time."""


@dataclass(frozen=True)
class Unloaded:
    """What a request takes when nothing else runs."""

    ttft_seconds: float
    tpot_seconds: float

    @classmethod
    def of(cls, several: Sequence[Unloaded]) -> Unloaded:
        """Return the medians."""
        return cls(median([one.ttft_seconds for one in several]), median([one.tpot_seconds for one in several]))


Alone = dict[str, Unloaded]
"""By size class."""


def limits_of(alone: Alone, options: GoodputOptions) -> dict[str, Limits]:
    """Return the limits of each size class, by what the reference takes."""
    # The time per token hardly depends on the class, and a class has few samples.
    usual = median([one.tpot_seconds for one in alone.values()])
    return {
        size_class: Limits(
            options.ttft_slo or options.ttft_slo_factor * one.ttft_seconds,
            options.tpot_slo or max(_LEAST_TPOT_SECONDS, options.tpot_slo_factor * max(usual, one.tpot_seconds)),
        )
        for size_class, one in alone.items()
    }


def shapes_of(traffic: Traffic, seeds: Sequence[int]) -> Iterator[Shape]:
    """Yield all requests of a traffic."""
    return (arrival.shape for seed in seeds for arrival in traffic.pattern(seed))


def typical(traffics: Sequence[Traffic], seeds: Sequence[int]) -> dict[str, Shape]:
    """Return the request of median size of each class, with an answer long enough to time its tokens."""
    by_class: dict[str, list[Shape]] = {}
    for traffic in traffics:
        for shape in shapes_of(traffic, seeds):
            by_class.setdefault(shape.size_class, []).append(shape)
    ordered = {name: sorted(several, key=lambda shape: shape.size) for name, several in sorted(by_class.items())}
    return {
        name: replace(several[len(several) // 2], answer_tokens=UNLOADED_TOKENS, image_ids=())
        for name, several in ordered.items()
    }


def serial_seconds(traffic: Traffic, seeds: Sequence[int], alone: Alone) -> float:
    """Return the mean time of a request if they are answered one after the other."""
    seconds = [
        alone[shape.size_class].ttft_seconds + (shape.answer_tokens - 1) * alone[shape.size_class].tpot_seconds
        for shape in shapes_of(traffic, seeds)
    ]
    return sum(seconds) / len(seconds)


def meets(traffic: Traffic, seeds: Sequence[int], alone: Alone, limits: Mapping[str, Limits]) -> bool:
    """Tell whether a deployment meets the limits at least when nothing else runs."""
    met = [
        alone[shape.size_class].ttft_seconds <= limits[shape.size_class].ttft_seconds
        and alone[shape.size_class].tpot_seconds <= limits[shape.size_class].tpot_seconds
        for shape in shapes_of(traffic, seeds)
    ]
    return sum(met) >= TARGET * len(met)
