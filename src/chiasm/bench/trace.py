"""Reads a person's own arrivals and sizes: JSON lines, one request each.

::

    {"time": 12.5, "prompt_tokens": 120, "images": [[1024, 768], 512], "answer_tokens": 64, "image_ids": ["a", "b"]}

``time`` is in seconds, from whenever you like, and must not go back; an image is ``[width, height]`` or one number for a
square, and images with the same id are the same file. ``images`` and ``image_ids`` may be left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from chiasm.bench.traffic import Arrival, Shape
from chiasm.errors import ConfigurationError
from chiasm.wire import UNREADABLE

MAX_LINES = 100_000
_MAX_LINE_BYTES = 1 << 16
_WINDOW = 60
"""Requests of a trial."""
_LEAST_SECONDS = 1e-6
"""From the first request to the last."""

Tokens = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
Pixels = Annotated[int, msgspec.Meta(ge=1, le=1 << 14)]
# Not tuple[Pixels, Pixels]: msgspec 0.22 crashes on a union with a tuple of constrained numbers.
WidthAndHeight = Annotated[list[Pixels], msgspec.Meta(min_length=2, max_length=2)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e10)]  # Unix time too


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    time: Seconds
    prompt_tokens: Tokens
    answer_tokens: Tokens
    images: Annotated[list[Pixels | WidthAndHeight], msgspec.Meta(max_length=64)] = []
    image_ids: Annotated[list[Annotated[str, msgspec.Meta(max_length=256)]], msgspec.Meta(max_length=64)] | None = None


_decoder = msgspec.json.Decoder(_Line)


@dataclass(frozen=True)
class Trace:
    """The requests of a file. A seed takes the window of requests that begins at its place, and goes on at the beginning."""

    name: str
    requests: Sequence[Arrival]
    """At least two, with times as in the file."""

    @property
    def rate(self) -> float:
        """Requests per second in the file."""
        return (len(self.requests) - 1) / (self.requests[-1].time - self.requests[0].time)

    def pattern(self, seed: int) -> list[Arrival]:
        """Return up to 60 requests, whose times are those of the file, scaled to one request per second on average."""
        number = min(_WINDOW, len(self.requests))
        start = seed * number % len(self.requests)
        chosen = [self.requests[(start + place) % len(self.requests)] for place in range(number)]
        times, now, before = [], 0.0, chosen[0].time
        for arrival in chosen:
            # Where the file starts again, the next request comes after a gap of usual length.
            now += arrival.time - before if arrival.time >= before else 1 / self.rate
            before = arrival.time
            times.append(now)
        scale = (number - 1) / times[-1] if times[-1] > 0 else 0.0
        return [Arrival(scale * time, arrival.shape) for time, arrival in zip(times, chosen, strict=True)]


def read_trace(file: Path) -> Trace:
    """Read a trace. Raises ConfigurationError, with the number of the line and what is wrong with it."""
    found: list[Arrival] = []
    try:
        with file.open("rb") as lines:
            number = 0
            while line := lines.readline(_MAX_LINE_BYTES + 1):
                number += 1
                if line.strip():
                    found.append(_arrival(file, number, line, found[-1].time if found else 0.0))
    except OSError as error:
        raise ConfigurationError(f"Cannot read the trace {file}: {error.strerror or error}.") from error
    if len(found) < 2 or found[-1].time - found[0].time < _LEAST_SECONDS:
        raise ConfigurationError(f"{file} needs at least two requests at different times.")
    return Trace(file.stem, found)


def _arrival(file: Path, number: int, line: bytes, before: float) -> Arrival:
    def wrong(reason: str) -> ConfigurationError:
        return ConfigurationError(f"{file}, line {number}: {reason}.")

    if number > MAX_LINES:
        raise wrong(f"a trace has at most {MAX_LINES} lines; cut the file")
    if len(line) > _MAX_LINE_BYTES:
        raise wrong(f"a line has at most {_MAX_LINE_BYTES} bytes")
    try:
        read = _decoder.decode(line)
    except UNREADABLE as error:
        raise wrong(str(error).rstrip(".")) from None
    if read.time < before:
        raise wrong(f"the time {read.time:g} is before that of the request before it, {before:g}; sort the lines")
    if read.image_ids is not None and len(read.image_ids) != len(read.images):
        raise wrong(f"there are {len(read.images)} images and {len(read.image_ids)} image_ids")
    images = tuple((one, one) if isinstance(one, int) else (one[0], one[1]) for one in read.images)
    return Arrival(read.time, Shape(read.prompt_tokens, images, read.answer_tokens, tuple(read.image_ids or ())))
