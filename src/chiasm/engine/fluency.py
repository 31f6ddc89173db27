"""How many rows of prompts a step computes beside decodes, so that running streams stay fluent.

What a step prefills delays the tokens of all that it decodes. One token may be late by so much, since a reader doesn't notice
it; an answer whose tokens are all late is slow. So there are two limits: of a single step, and of the mean of each stream since
its first token. A stream that has decoded alone for a while leaves room for prompts, and one of five tokens, each of which
meets a prompt, doesn't. Both limits are multiples of what a step that only decodes takes when nothing disturbs it. How long
steps take is measured, so what other programs and instances take from the device counts as well.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from chiasm.engine.pace import Pace, Undisturbed

if TYPE_CHECKING:
    from chiasm.engine.sequence import Sequence
    from chiasm.engine.step import Step
    from chiasm.wire import Costs

_ROWS = {"cpu": (16, 64), "cuda": (256, 1024)}
"""Fewest and most prefill rows in a step that also decodes. Fewer would use the device badly, and prompts would never end; more
gain nothing."""
_LONGEST_STEP = 2.5
"""A step that also prefills takes at most about this many times one that only decodes, or streams would stutter."""
_LONGEST_MEAN = 2.25
"""The same for the mean of all steps of a stream."""
_MOST_BEHIND = 8
"""A stream counts as behind by at most the time of so many steps that only decode: a pause of the machine is soon forgotten."""
_CHEAPEST_ROW = 1e-9
"""Seconds that a row takes at least. On a GPU a few more rows may make a step no longer."""


def slowdown_beside_streams(device_type: str, costs: Costs) -> float:
    """Return by what factor a prompt takes longer while the engine decodes; 0 if nothing was measured."""
    decode, row = costs.decode_step_seconds, costs.prefill_seconds_per_token
    if not decode or not row:
        return 0.0
    fewest, most = _ROWS[device_type]
    return 1 + decode / min(most * row, max(fewest * row, (_LONGEST_MEAN - 1) * decode))


class Fluency:
    """What the streams of one engine have been through. Instants and lengths are in seconds, on any clock."""

    def __init__(self, device_type: str, costs: Costs) -> None:
        """``device_type`` is ``cpu`` or ``cuda``; ``costs`` are what the engine measured at start."""
        self._fewest, self._most = _ROWS[device_type]
        self._step_seconds = costs.decode_step_seconds
        self._knows = costs.prefill_seconds_per_token > 0
        self._row = Pace(costs.prefill_seconds_per_token)
        if self._knows:
            rows = (_LONGEST_STEP - 1) * costs.decode_step_seconds / costs.prefill_seconds_per_token
            self._most = round(min(self._most, max(self._fewest, rows)))
        self._undisturbed = Undisturbed(1.0)
        """What steps that only decode take when nothing disturbs them, in what was expected at start: texts grow longer."""
        self._allowed = 0.0
        """How long all steps that decoded may have taken."""
        self._began: dict[Sequence, float] = {}
        """Streams, and how far ``_allowed`` was ahead of the clock when they began."""

    def prefill_rows(self, now: float) -> int:
        """Return how many rows of prompts the next step may have if it also decodes."""
        if not self._began or not self._knows:
            return self._most
        alone = self._alone(len(self._began))
        longest = _LONGEST_MEAN * alone + self._allowed - now - max(self._began.values())
        rows = (longest - alone) / max(_CHEAPEST_ROW, self._row.seconds_per_token)
        return round(min(self._most, max(self._fewest, rows)))

    def prompt_seconds(self, step: Step, seconds: float) -> dict[str, float]:
        """Return what each request's prompt took of a step of so many seconds, by request."""
        rows: Counter[str] = Counter()
        for part in step.prefills:
            rows[part.sequence.request_id] += part.num_tokens
        per_row = self._of_prompts(step, seconds) / max(1, rows.total())
        return {name: number * per_row for name, number in rows.items()}

    def note(self, step: Step, seconds: float, now: float) -> None:
        """Learn from a step that took so many seconds until ``now``, and whose tokens are in the sequences."""
        decodes = len(step.decodes)
        if decodes and self._knows:
            if rows := step.num_rows - decodes:
                self._row.note(rows, self._of_prompts(step, seconds))
            else:
                self._undisturbed.note(seconds / self._expected(decodes))
            self._allowed += _LONGEST_MEAN * self._alone(decodes)
        streams = [part.sequence for part in step.scheduled if part.samples and not part.sequence.finished]
        ahead = self._allowed - now
        latest = ahead + _MOST_BEHIND * self._alone(max(1, decodes))
        self._began = {one: min(latest, self._began.get(one, ahead)) for one in streams}

    def _of_prompts(self, step: Step, seconds: float) -> float:
        """Return the part of a step that it would not have taken without rows of prompts."""
        return max(0.0, seconds - self._alone(len(step.decodes))) if step.decodes and self._knows else seconds

    def _alone(self, decodes: int) -> float:
        """Return how long a step takes that only decodes so many sequences, if nothing disturbs it."""
        return self._undisturbed.value * self._expected(decodes)

    def _expected(self, decodes: int) -> float:
        """Return the same as it was expected at start."""
        return self._step_seconds + (decodes - 1) * self._row.seconds_per_token
