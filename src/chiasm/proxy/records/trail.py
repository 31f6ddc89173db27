"""What the proxy notes about a request on its way: instants, and what instances reported. Nothing is computed here.

All instants are on the clock of ``time.monotonic``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from chiasm.proxy.records.trace_context import TraceContext

_MAX_CALLS = 16
"""Calls of language instances, and steps of the proxy, that are noted: retries have no other bound than the deadline."""
_MAX_ITEMS = 64
_MAX_REPORT_CHARACTERS = 64 << 10
"""Of what all instances reported together."""


class EncoderCall(NamedTuple):
    """One call of an encoder."""

    instance: str
    sent_at: float
    answered_at: float | None
    """None if the request ended before: an instance may have an embedding before the encoder has answered."""
    timing: str = ""
    """Its ``Server-Timing``; empty if it has none."""


class EncodedAt(NamedTuple):
    """The call that encoded an image, or had yet to answer, and the image's place in it."""

    call: EncoderCall
    place: int


class ItemTrail(NamedTuple):
    """How the embedding of an image was made."""

    identifier: str
    asked_at: float
    """When the request began to wait for an encoder."""
    encoded: EncodedAt


@dataclass(slots=True)
class LanguageCall:
    """One call of a language instance."""

    instance: str
    role: str
    sent_at: float
    answered_at: float | None = None
    """When the head of its answer came, which in a stream comes with the first token; None if it has failed."""
    timing: str = ""


class Step(NamedTuple):
    """Something that the proxy did, or waited for, before it called an instance."""

    name: str
    began: float
    ended: float


class Trail:
    """One request, as far as it has come."""

    __slots__ = ("_last", "_room", "calls", "client_trace", "fetches", "identifiers", "items", "steps", "trace")

    def __init__(self, arrival: float, client_trace: TraceContext | None = None) -> None:
        """``client_trace`` is the span that the client names as the request's parent."""
        self.client_trace = client_trace
        self.trace = client_trace
        """The span of which instances are told: the request's own, or the client's if the request has none."""
        self.steps: list[Step] = []
        self.fetches: Mapping[int, tuple[float, float]] = {}
        """When images were fetched, by index."""
        self.identifiers: Sequence[str] = ()
        """Of its images, in the order in which they occur."""
        self.items: list[ItemTrail] = []
        self.calls: list[LanguageCall] = []
        self._last = arrival
        self._room = _MAX_REPORT_CHARACTERS

    def passed(self, name: str) -> None:
        """Note that a step has ended, which began where the one before it ended."""
        now = time.monotonic()
        if len(self.steps) < _MAX_CALLS:
            self.steps.append(Step(name, self._last, now))
        self._last = now

    def resume(self) -> None:
        """Begin the next step now: what was since the last one is no step of the proxy."""
        self._last = time.monotonic()

    def encoded(self, identifier: str, asked_at: float, encoded: EncodedAt) -> None:
        """Note that an embedding is published, or that the request ends before its encoder has said so."""
        if len(self.items) < _MAX_ITEMS and self._has_room(encoded.call.timing):
            self.items.append(ItemTrail(identifier, asked_at, encoded))

    def call_language(self, instance: str, role: str) -> LanguageCall:
        """Note that a language instance is called now."""
        call = LanguageCall(instance, role, time.monotonic())
        if len(self.calls) < _MAX_CALLS:
            self.calls.append(call)
        return call

    def answered(self, call: LanguageCall, timing: str | None) -> None:
        """Note the head of its answer, with its ``Server-Timing``."""
        call.answered_at = time.monotonic()
        if timing and self._has_room(timing):
            call.timing = timing

    def _has_room(self, text: str) -> bool:
        self._room -= len(text)
        return self._room >= 0
