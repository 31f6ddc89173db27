"""How much work a prompt is, what a token of it costs an engine now, and what something takes when nothing disturbs it."""

from __future__ import annotations

from chiasm.models.base import Prompt

ITEM_WEIGHT = 2.0
"""Work of an item's token in tokens of text: it is encoded and prefilled."""
_MEMORY = 0.9
"""Share of what was learned that a further step leaves."""
_FASTER, _SLOWER = 0.5, 0.02
"""Shares by which a measurement corrects what something takes undisturbed: most are disturbed."""
_START_ROWS = 256.0
"""Rows that the measurement at start counts for."""


def prompt_work(prompt: Prompt) -> float:
    """Return the work of a prompt, in tokens of text."""
    item_tokens = sum(item.length for item in prompt.items)
    return len(prompt.token_ids) + (ITEM_WEIGHT - 1) * item_tokens


class Pace:
    """What a token costs an engine now: an exponential average over its steps, by rows.

    Tokens are those of prompts; of an encoder, those of images.
    """

    def __init__(self, seconds_per_token: float = 0.0) -> None:
        """``seconds_per_token`` is where it begins, as measured at start; 0 if nothing is known before the first step."""
        self._rows = _START_ROWS if seconds_per_token else 0.0
        self._seconds = _START_ROWS * seconds_per_token

    @property
    def seconds_per_token(self) -> float:
        """0 while nothing is known: requests are due as they arrive, and work takes no time."""
        return self._seconds / self._rows if self._rows else 0.0

    def note(self, rows: int, seconds: float) -> None:
        """Learn from a step of so many rows, prefill and decode together."""
        self._seconds = _MEMORY * self._seconds + seconds
        self._rows = _MEMORY * self._rows + rows


class Undisturbed:
    """What something takes when nothing disturbs it, from measurements of which most are disturbed."""

    def __init__(self, value: float = 0.0) -> None:
        """``value`` is where it begins; 0 if nothing is known before the first measurement."""
        self.value = value

    def note(self, value: float) -> None:
        """Learn from a measurement. One that took longer counts little, and at most as twice what is known."""
        known = self.value or value
        self.value = known + (min(value, 2 * known) - known) * (_FASTER if value < known else _SLOWER)
