"""Tokens to text as they come, and the stop strings in it."""

from __future__ import annotations

from typing import NamedTuple

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from chiasm.engine.request import SamplingParams


class TextStep(NamedTuple):
    """What one token adds: text that is certain, and the stop string that it completed, if it did."""

    text: str
    stop: str | None


class Detokenizer:
    """Text of one growing answer. Holds back half characters, and what may still become a stop string."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, prompt_token_ids: list[int]) -> None:
        # The last tokens of the prompt decide whether the first of the answer begins with a space.
        self._stream = DecodeStream(prompt_token_ids[-8:], skip_special_tokens=params.skip_special_tokens)
        self._tokenizer = tokenizer
        self._skip_special_tokens = params.skip_special_tokens
        self._stops = params.stop
        self._include_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._num_tokens = 0
        self._longest = max((len(stop) for stop in params.stop), default=0)
        self._pending = ""

    def add(self, token_id: int) -> TextStep:
        """Text that became certain with this token. A stop string is looked for once ``min_tokens`` are there."""
        self._num_tokens += 1
        self._pending += self._decode(token_id)
        if not self._stops:
            return self._take(len(self._pending), None)
        if self._num_tokens > self._min_tokens:
            found = [(self._pending.find(stop), stop) for stop in self._stops]
            found = [(position, stop) for position, stop in found if position >= 0]
            if found:
                position, stop = min(found)
                return self._take(position + (len(stop) if self._include_stop else 0), stop)
        return self._take(len(self._pending) - self._held_back(), None)

    def finish(self) -> str:
        """The rest, when the answer ended otherwise than by a stop string."""
        return self._take(len(self._pending), None).text

    def _decode(self, token_id: int) -> str:
        try:
            return self._stream.step(self._tokenizer, token_id) or ""
        except Exception:  # tokenizers raises a bare Exception where earlier tokens decode differently with this one
            self._stream = DecodeStream(skip_special_tokens=self._skip_special_tokens)
            return self._stream.step(self._tokenizer, token_id) or ""

    def _held_back(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        for length in range(min(self._longest - 1, len(self._pending)), 0, -1):
            end = self._pending[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0

    def _take(self, length: int, stop: str | None) -> TextStep:
        text, self._pending = self._pending[:length], self._pending[length:]
        return TextStep(text, stop)
