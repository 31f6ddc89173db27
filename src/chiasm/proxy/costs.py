"""What work costs an instance: what it reports of itself, corrected by what its answers report.

State only: no clock and no I/O. All costs are seconds of the instance's own computing, without its queue.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

from chiasm.wire import Costs, ImageCost

# Of an instance that reports no costs. Only their ratios matter until its answers have corrected them.
_PREFILL_SECONDS_PER_TOKEN = 1e-4
_TOKENS_PER_IMAGE = 1000
_ENCODE_SECONDS_PER_PIXEL = 4e-7

_STEP_TOKENS = 1024
"""Tokens that an instance computes in a step of prefill."""
_STREAM_SLOWS = 0.03
"""Share by which each running stream slows down prefill, of an instance that doesn't say."""

_GAIN = 0.25
"""Share of an error that one measurement corrects for all sizes."""
_GAIN_OF_KIND = 0.15
"""Share that it corrects in addition for its own size class."""
_MOST = math.log(3)
"""A single error counts at most as this factor, so that one outlier can't condemn an instance."""
_HALF_LIFE_SECONDS = 120.0
"""Time without a measurement after which half of a correction is forgotten, so that an instance that gets no work because it
was slow gets a chance to show that it is not."""


class Correction:
    """The factor between measured and predicted values: one for all, refined for each kind of value.

    It is learned in logarithms with bounded steps, so that "three times slower" weighs as much as "three times faster". A
    lasting change by a factor of 5 is known to a fifth after ten measurements.
    """

    def __init__(self) -> None:
        self._common = 0.0
        self._kinds: dict[int, float] = {}
        self._learned_at = 0.0

    def factor(self, now: float, kind: int = 0) -> float:
        """Return measured over predicted, as is known at ``now`` (seconds on any clock)."""
        if not self._common and not self._kinds:
            return 1.0
        return math.exp((self._common + self._kinds.get(kind, 0.0)) * self._remembered(now))

    def learn(self, measured: float, predicted: float, now: float, kind: int = 0) -> None:
        """Take one measurement. ``predicted`` is without correction; values that aren't positive are ignored."""
        if not (0 < measured < math.inf and predicted > 0):
            return
        remembered = self._remembered(now)
        self._common *= remembered
        self._kinds = {known: value * remembered for known, value in self._kinds.items()}
        self._learned_at = now
        error = math.log(measured / predicted) - self._common - self._kinds.get(kind, 0.0)
        error = min(_MOST, max(-_MOST, error))
        self._common += _GAIN * error
        self._kinds[kind] = self._kinds.get(kind, 0.0) + _GAIN_OF_KIND * error

    def _remembered(self, now: float) -> float:
        return float(0.5 ** (max(0.0, now - self._learned_at) / _HALF_LIFE_SECONDS))


class InstanceCosts:
    """The costs of one instance."""

    def __init__(self) -> None:
        self.reported = Costs()
        """What it reports; all zero while unknown."""
        self.encode = Correction()
        """By size class: powers of two of pixels."""
        self.prefill = Correction()
        self.step = Correction()
        self.transfer_seconds = 0.0
        """From an encoder's answer until this language instance had the embedding."""

    def learn_with(self, other: InstanceCosts | None) -> None:
        """Correct costs from now on by what the other instance's answers tell too; with None, by one's own alone."""
        source = other or InstanceCosts()
        self.encode, self.prefill, self.step = source.encode, source.prefill, source.step

    def encode_seconds(self, pixels: int, now: float) -> float:
        """Return the seconds to encode an image of this size."""
        return self._reported_encode_seconds(pixels) * self.encode.factor(now, size_class(pixels))

    def image_tokens(self, pixels: int) -> float:
        """Return the tokens that an image of this size takes in a prompt."""
        images = self.reported.images
        return _interpolated(images, pixels, [one.tokens for one in images]) or _TOKENS_PER_IMAGE

    def prefill_seconds_per_token(self, now: float) -> float:
        return (self.reported.prefill_seconds_per_token or _PREFILL_SECONDS_PER_TOKEN) * self.prefill.factor(now)

    def decode_step_seconds(self, now: float) -> float:
        """Return what a step of decoding takes there, with the sequences that it has; 0 if the instance reports nothing."""
        reported = self.reported.decode_step_seconds
        return reported and reported * self.step.factor(now)

    def slowdown(self, streams: int) -> float:
        """Return by what factor prefill takes longer beside so many running streams."""
        if not streams:
            return 1.0
        return max(1.0, self.reported.beside_streams) if self.reported.beside_streams else 1 + _STREAM_SLOWS * streams

    def step_seconds(self, streams: int, prompt_seconds: float, now: float) -> float:
        """Return what a step takes that decodes so many streams, beside prompts that take so many seconds if there are any."""
        if not streams:
            return min(prompt_seconds, _STEP_TOKENS * self.prefill_seconds_per_token(now))
        decode, slower = self.decode_step_seconds(now), self.slowdown(streams) - 1
        return decode + (min(prompt_seconds, decode / slower) if slower else prompt_seconds)

    def learned(self, now: float) -> Costs:
        """Return the reported costs, corrected; of images, those sizes that it reports."""
        return Costs(
            prefill_seconds_per_token=self.prefill_seconds_per_token(now),
            decode_step_seconds=self.decode_step_seconds(now),
            beside_streams=self.reported.beside_streams,
            images=[
                ImageCost(
                    pixels=one.pixels,
                    tokens=one.tokens,
                    encode_seconds=one.encode_seconds and self.encode_seconds(one.pixels, now),
                )
                for one in self.reported.images
            ],
        )

    def learn_encode(self, pixels: Sequence[int], seconds: float, now: float) -> None:
        """Take what encoding images of these sizes has cost together."""
        predicted = sum(map(self._reported_encode_seconds, pixels))
        for kind in {size_class(size) for size in pixels}:
            self.encode.learn(seconds, predicted, now, kind)

    def learn_prefill(self, tokens: float, seconds: float, now: float) -> None:
        """Take what computing this number of prompt tokens has cost."""
        self.prefill.learn(
            seconds, tokens * (self.reported.prefill_seconds_per_token or _PREFILL_SECONDS_PER_TOKEN), now
        )

    def learn_step(self, seconds: float, now: float) -> None:
        """Take what a step of decoding has taken."""
        self.step.learn(seconds, self.reported.decode_step_seconds, now)

    def learn_transfer(self, seconds: float) -> None:
        """Take the time from an encoder's answer until the embedding was usable."""
        error = seconds - self.transfer_seconds
        self.transfer_seconds = max(0.0, self.transfer_seconds + _GAIN * min(error, max(0.005, self.transfer_seconds)))

    def _reported_encode_seconds(self, pixels: int) -> float:
        images = self.reported.images
        known = _interpolated(images, pixels, [one.encode_seconds for one in images])
        return known or pixels * _ENCODE_SECONDS_PER_PIXEL


def size_class(pixels: int) -> int:
    """Return the size class of an image: the power of two above its pixels."""
    return pixels.bit_length()


def _interpolated(images: Sequence[ImageCost], pixels: int, values: Sequence[float]) -> float:
    """Return the value at this size; 0 if there is none. Beyond the sizes that were measured, processors resize images."""
    if not images:
        return 0.0
    index = bisect_left(images, pixels, key=lambda one: one.pixels)
    if index == 0 or index == len(images):
        return values[min(index, len(images) - 1)]
    below, above = images[index - 1].pixels, images[index].pixels
    share = (pixels - below) / (above - below)
    return values[index - 1] + share * (values[index] - values[index - 1])
