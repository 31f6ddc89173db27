"""A request as the engine's thread knows it: its choices, their text so far, and where its time went."""

from __future__ import annotations

import asyncio
from collections.abc import Set
from dataclasses import dataclass, field
from typing import NamedTuple

from chiasm.engine.detokenizer import Detokenizer
from chiasm.engine.request import FinishReason, GenerateRequest, ItemTiming, Output, RequestTiming
from chiasm.engine.sequence import Sequence


class Addition(NamedTuple):
    """What one token does to a choice: text that it makes certain, and the end, if it is one."""

    text: str
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class Choice:
    """One continuation of a request."""

    def __init__(
        self, sequence: Sequence, detokenizer: Detokenizer, *, eos_token_ids: Set[int], max_model_len: int
    ) -> None:
        self.sequence = sequence
        self.done = False
        self._detokenizer = detokenizer
        self._eos_token_ids = eos_token_ids
        self._max_model_len = max_model_len

    def add(self, token_id: int, number: int) -> Addition:
        """Output token ``number``, counted from 1, is there. Each is added once, in order."""
        sequence, params = self.sequence, self.sequence.sampling
        enough = number >= params.min_tokens
        if enough and not params.ignore_eos and token_id in self._eos_token_ids:
            return Addition(self._detokenizer.finish(), "stop")
        if enough and token_id in params.stop_token_ids:
            return Addition(self._detokenizer.finish(), "stop", token_id)
        text, stop = self._detokenizer.add(token_id)
        if stop is not None:
            return Addition(text, "stop", stop)
        if number >= params.max_tokens or sequence.num_prompt + number >= self._max_model_len:
            return Addition(text + self._detokenizer.finish(), "length")
        return Addition(text)


@dataclass
class RequestState:
    """What belongs to one request. ``loop`` and ``outputs`` are those of the coroutine that waits for its outputs."""

    request: GenerateRequest
    loop: asyncio.AbstractEventLoop
    outputs: asyncio.Queue[Output | BaseException]
    arrived: float
    choices: list[Choice] = field(default_factory=list)
    timing: RequestTiming = field(default_factory=RequestTiming)
    missing: dict[str, ItemTiming] = field(default_factory=dict)
    """Items counted neither as hit nor as waited for yet."""
    first_scheduled: float | None = None
    load_started: float | None = None
    handed_over: bool = False
    """Its blocks were left for a decode instance."""
    stalled_since: float | None = None
    waited_before_start: float = 0.0

    @property
    def sequences(self) -> list[Sequence]:
        return [choice.sequence for choice in self.choices]

    @property
    def done(self) -> bool:
        return all(choice.done for choice in self.choices)

    def note_scheduled(self, now: float) -> None:
        """A chunk of its prompt is in the step that begins."""
        if self.first_scheduled is None:
            self.first_scheduled = now
            self.timing.queue_seconds = now - self.arrived - self.waited_before_start - self.timing.encode_seconds

    def note_stalled(self, stalled: bool, now: float) -> None:
        """Whether it can go on, or waits for an embedding."""
        if stalled and self.stalled_since is None:
            self.stalled_since = now
        elif not stalled and self.stalled_since is not None:
            self.timing.wait_seconds += now - self.stalled_since
            if self.first_scheduled is None:
                self.waited_before_start += now - self.stalled_since
            self.stalled_since = None

    def note_load_started(self, now: float) -> None:
        """It has blocks for the KV that is elsewhere."""
        if self.load_started is None:
            self.load_started = now
            self.timing.queue_seconds = now - self.arrived

    def note_loaded(self, now: float) -> None:
        """The KV is in its blocks."""
        if self.load_started is not None and self.timing.kv_seconds is None:
            self.timing.kv_seconds = now - self.load_started

    def note_token(self, now: float) -> None:
        """A token was sampled."""
        timing = self.timing
        if timing.first_token_seconds is None:
            timing.first_token_seconds = now - self.arrived
            if self.first_scheduled is not None:
                waited_since_start = timing.wait_seconds - self.waited_before_start
                timing.prefill_seconds = now - self.first_scheduled - waited_since_start - timing.transfer_seconds
