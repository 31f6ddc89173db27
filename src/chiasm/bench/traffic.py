"""What open-loop requests ask for and when they arrive: named mixes, each seeded. Nothing here sends or measures.

The mixes have the shape that ServeGen (Xiang et al., 2025, https://arxiv.org/abs/2505.09999) reports of a production service
for multimodal models: bursty arrivals (gaps of a Gamma distribution), lognormal lengths, 1.5 images per request with images,
74 % of which have one. Lengths are scaled down to models that two CPU cores can run.
"""

from __future__ import annotations

import itertools
import math
import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

LONGEST_SECONDS = 12.0
"""How long a trial of the benchmark sends at most; at a low rate it has fewer requests."""
PATIENCE = 2.0
"""A request is given up when it has taken so many times its limit."""
LEAST_REQUESTS = 8
"""Of a trial."""
ARRIVAL_CV = 2.2
"""Coefficient of variation of the gaps between arrivals; 1 would be a Poisson process."""
SIDE = 512
"""Width and height of the mixes' images in pixels."""
PIXELS_PER_TOKEN = 1024
"""By which an image counts as tokens when requests are put into size classes; the models themselves differ."""
_SMALLEST_CLASS = 64


@dataclass(frozen=True)
class Shape:
    """What one request asks for, without its content."""

    prompt_tokens: int
    """Tokens of the text, at least 1."""
    images: tuple[tuple[int, int], ...]
    """Width and height in pixels of each image."""
    answer_tokens: int
    """Exactly so many, at least 1."""
    image_ids: tuple[str, ...] = ()
    """Names the images, so that some occur again; empty: each is new."""

    @property
    def size(self) -> int:
        """About how many tokens the prompt has."""
        return self.prompt_tokens + sum(width * height for width, height in self.images) // PIXELS_PER_TOKEN

    @property
    def size_class(self) -> str:
        """Name of the class of requests whose prompts are about as long, within a factor of two."""
        limit = max(_SMALLEST_CLASS, 1 << math.ceil(math.log2(self.size)))
        return f"{'images' if self.images else 'text'} up to {limit} tokens"


@dataclass(frozen=True)
class Arrival:
    """One request of a pattern."""

    time: float
    """Seconds from the first one, if one request per second arrives on average."""
    shape: Shape


class Timed(Protocol):
    """What has a time of arrival in seconds at one request per second."""

    @property
    def time(self) -> float: ...


_T = TypeVar("_T", bound=Timed)


def within(requests: Sequence[_T], rate: float, seconds: float, *, least: int = LEAST_REQUESTS) -> Sequence[_T]:
    """Return the requests, in order of time, that arrive within so many seconds at a rate, and at least the first ones."""
    number = bisect_right(requests, seconds * rate, key=lambda request: request.time)
    return requests[: max(least, number)]


class Traffic(Protocol):
    """Where patterns of arrivals come from."""

    @property
    def name(self) -> str: ...

    def pattern(self, seed: int) -> list[Arrival]:
        """Return the requests of a trial in the order of their times; the same seed gives the same."""
        ...


@dataclass(frozen=True)
class Mix:
    """Random requests of one kind."""

    name: str
    purpose: str
    """What it is made of, in a few words."""
    requests: int
    """In one trial."""
    draw: Callable[[random.Random], Shape]
    bursts: bool = False
    """Whether the rate is ten times as high now and then."""

    def pattern(self, seed: int) -> list[Arrival]:
        generator = random.Random(f"{self.name} {seed}")
        shapes = [self.draw(generator) for _ in range(self.requests)]
        times = arrivals(generator, self.requests)
        if self.bursts:
            times = with_bursts(times)
        return [Arrival(time, shape) for time, shape in zip(times, shapes, strict=True)]


def arrivals(generator: random.Random, number: int) -> list[float]:
    """Return times of arrival from 0 on, whose gaps follow a Gamma distribution with ``ARRIVAL_CV``.

    They are scaled so that the ``number`` requests take ``number`` seconds, the gap after the last one included. Otherwise a
    third more or fewer would arrive per second than intended, since there are few of them.
    """
    gaps = [generator.gammavariate(1 / ARRIVAL_CV**2, ARRIVAL_CV**2) for _ in range(number)]
    scale = number / sum(gaps)
    return [scale * time for time in itertools.accumulate(gaps[:-1], initial=0.0)]


# ---- bursts ------------------------------------------------------------------------------------------------------------

BURST_FACTOR = 10.0
_BURST_SHARE = 0.25
"""Share of the requests that arrive in bursts."""
_BURST_REQUESTS = 12.0
"""Requests of one burst."""


def with_bursts(times: Sequence[float]) -> list[float]:
    """Return the times with some stretches ten times as fast and all others slower, in as much time altogether.

    Twelve of each 48 requests come in a burst. Time is measured in requests, so a burst is longer at a lower rate.
    """
    period = _BURST_REQUESTS / _BURST_SHARE
    calm = period - _BURST_REQUESTS
    # Such that a period, its calm requests at this rate and its burst at ten times this rate, takes as long as before:
    calm_rate = (calm + _BURST_REQUESTS / BURST_FACTOR) / period

    def moved(time: float) -> float:
        periods, within = divmod(time, period)
        in_burst = min(max(0.0, within - calm / 2), _BURST_REQUESTS)
        return periods * period + (within - in_burst + in_burst / BURST_FACTOR) / calm_rate

    return [moved(time) for time in times]


# ---- the mixes ---------------------------------------------------------------------------------------------------------

_TEXT_SHARE = 0.7
_NUMBERS_OF_IMAGES = {1: 0.74, 2: 0.10, 3: 0.08, 4: 0.08}
"""ServeGen's 74 % with one image and 1.5 on average."""
_CATALOGUE = 40
"""Images of which the mix ``repeats`` asks."""


def _length(generator: random.Random, median: float, sigma: float, least: int, most: int) -> int:
    return min(most, max(least, round(generator.lognormvariate(math.log(median), sigma))))


def _text(generator: random.Random) -> Shape:
    return Shape(_length(generator, 80, 0.9, 8, 512), (), _length(generator, 24, 0.6, 8, 96))


def _with_images(generator: random.Random, number: int) -> Shape:
    prompt = _length(generator, 24, 0.6, 8, 96)
    return Shape(prompt, ((SIDE, SIDE),) * number, _length(generator, 24, 0.6, 8, 96))


def _images(generator: random.Random) -> Shape:
    (number,) = generator.choices(list(_NUMBERS_OF_IMAGES), list(_NUMBERS_OF_IMAGES.values()))
    return _with_images(generator, number)


def _mixed(generator: random.Random) -> Shape:
    return _text(generator) if generator.random() < _TEXT_SHARE else _images(generator)


def _heavy(generator: random.Random) -> Shape:
    number = generator.randint(4, 8)
    return Shape(_length(generator, 24, 0.6, 8, 96), ((SIDE, SIDE),) * number, generator.randint(3, 6))


def _repeats(generator: random.Random) -> Shape:
    shape = _with_images(generator, 1)
    (image,) = generator.choices(range(_CATALOGUE), [1 / rank for rank in range(1, _CATALOGUE + 1)])
    return Shape(shape.prompt_tokens, shape.images, shape.answer_tokens, (f"image {image}",))


MIXES = {
    mix.name: mix
    for mix in (
        Mix("text", "text only", 60, _text),
        Mix("mixed", "70 % text, the others with 1.5 images on average", 50, _mixed),
        Mix("images", "1 to 4 images each, 1.5 on average", 36, _images),
        Mix("heavy", "4 to 8 images each, answers of 3 to 6 tokens", 24, _heavy),
        Mix(
            "repeats",
            f"1 image each, of {_CATALOGUE} by Zipf's law with exponent 1, and another question",
            48,
            _repeats,
        ),
        Mix(
            "burst",
            "like mixed, with a quarter of the requests in bursts at ten times the rate",
            48,
            _mixed,
            bursts=True,
        ),
    )
}
"""By name."""
