"""Seeded requests of all kinds: images with questions, for measurements that compare answers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from chiasm.bench.images import png
from chiasm.demo.images import draw_example

_IMAGES = {"text": 0, "1 image": 1, "2 images": 2, "3 images": 3, "4 images": 4, "the same image twice": 2}
_SHARES = {
    "text": 4,
    "1 image": 6,
    "2 images": 3,
    "3 images": 2,
    "4 images": 2,
    "the same image twice": 3,
}
"""Of 20 requests."""
_PENALTIES: tuple[dict[str, float], ...] = (
    {},
    {"presence_penalty": 1.0, "frequency_penalty": 0.5},
    {"repetition_penalty": 1.3},
)


@dataclass(frozen=True)
class Request:
    """Images as files, and a question."""

    kind: str
    images: tuple[bytes, ...]
    question: str


def draw_requests(seed: int, count: int) -> list[Request]:
    """Requests of all kinds in a shuffled order; the same arguments give the same bytes."""
    kinds = [kind for kind, share in _SHARES.items() for _ in range(share)]
    drawn = [kinds[index % len(kinds)] for index in range(count)] if count >= len(kinds) else _few(kinds, count)
    random.Random(f"identity {seed}").shuffle(drawn)
    return [_draw(seed * 100_000 + index, kind) for index, kind in enumerate(drawn)]


def _few(kinds: Sequence[str], count: int) -> list[str]:
    distinct = list(dict.fromkeys(kinds))
    return [distinct[index % len(distinct)] for index in range(count)]


def _draw(seed: int, kind: str) -> Request:
    number = _IMAGES[kind]
    example = draw_example(seed, images=max(1, number))
    images = [png(image) for image in example.images[:number]]
    if kind == "the same image twice":
        images[1] = images[0]
    return Request(kind, tuple(images), example.question)


def sampling(seed: int, index: int) -> dict[str, Any]:
    """How request ``index`` is sampled: each with a seed of its own, two in three with penalties.

    Every other one goes on after the end token, since most answers of a trained checkpoint are over after a few.
    """
    fields: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "seed": seed * 100_000 + index}
    return fields | _PENALTIES[index % len(_PENALTIES)] | {"ignore_eos": index % 2 == 1}
