"""Finds calls of tools in the text of an answer, as it grows.

The answer's grammar makes sure that a call is complete and its arguments fit, unless the answer is cut off.
"""

from __future__ import annotations

import re
import secrets
from typing import Literal, NamedTuple

from chiasm.models.tool_format import ToolFormat

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
"""What a call has behind its beginning and before its arguments."""
_NOTABLE = re.compile(r'["\\{}\[\]]')


class CallBegins(NamedTuple):
    """A call, of which the name is known. Its arguments follow."""

    call: int
    """Counted over the calls of the answer."""
    call_id: str
    name: str


class Arguments(NamedTuple):
    """More of the arguments of a call: a piece of JSON."""

    call: int
    text: str


Piece = str | CallBegins | Arguments
"""A string is text of the answer outside of calls."""


class ToolCallParser:
    """The calls of one answer."""

    def __init__(self, tool_format: ToolFormat, *, after_text: bool = True) -> None:
        """``after_text``: a call may begin behind text. Otherwise an answer that doesn't begin with a call has none."""
        self._trigger = tool_format.trigger
        self._end = tool_format.end.strip()
        self._after_text = after_text
        self._state: Literal["text", "no call", "head", "arguments", "tail"] = "text"
        self._pending = ""
        self._depth = 0
        self._in_string = False
        self._is_escaped = False
        self.num_calls = 0

    @property
    def is_complete(self) -> bool:
        """Whether there are calls, and the last one has all of its arguments."""
        return self.num_calls > 0 and self._state != "arguments"

    def add(self, text: str) -> list[Piece]:
        """Return what this text makes certain."""
        self._pending += text
        pieces: list[Piece] = []
        while self._advance(pieces):
            pass
        return pieces

    def finish(self) -> list[Piece]:
        """Return the text that was held back, when the answer ends. A call without a name is no call, and is dropped."""
        text, self._pending = self._pending, ""
        return [text] if text and self._state == "text" and not self.num_calls else []

    def _advance(self, pieces: list[Piece]) -> bool:
        """Process what is pending in the current state; return whether the state has changed."""
        match self._state:
            case "text":
                return self._take_text(pieces)
            case "no call":
                return self._take_all(pieces)
            case "head":
                if (head := _HEAD.match(self._pending)) is None:
                    return False
                pieces.append(CallBegins(self.num_calls, f"call_{secrets.token_hex(12)}", head[1]))
                self._pending = self._pending[head.end() :]
                self.num_calls += 1
                self._state = "arguments"
            case "arguments":
                return self._take_arguments(pieces)
            case "tail":
                place = self._pending.find(self._end)
                if place < 0:
                    return False
                self._pending = self._pending[place + len(self._end) :]
                self._state = "text"
        return True

    def _take_text(self, pieces: list[Piece]) -> bool:
        if not (self._after_text or self.num_calls or self._may_begin_call()):
            self._state = "no call"
            return True
        place = self._pending.find(self._trigger)
        before = self._pending[:place] if place >= 0 else self._pending[: len(self._pending) - self._begun()]
        text = before.rstrip()  # white space before a call is not part of the answer
        if text and not self.num_calls:
            pieces.append(text)
        if place < 0:
            self._pending = self._pending[len(text) :]
            return False
        self._pending = self._pending[place + len(self._trigger) :]
        self._state = "head"
        return True

    def _take_all(self, pieces: list[Piece]) -> bool:
        if self._pending:
            pieces.append(self._pending)
            self._pending = ""
        return False

    def _may_begin_call(self) -> bool:
        """Whether what is pending begins with a trigger, or with the beginning of one."""
        text = self._pending.lstrip()
        return text.startswith(self._trigger) or self._trigger.startswith(text)

    def _begun(self) -> int:
        """Return the length of the longest suffix of what is pending that begins a trigger."""
        for length in range(min(len(self._trigger) - 1, len(self._pending)), 0, -1):
            if self._trigger.startswith(self._pending[-length:]):
                return length
        return 0

    def _take_arguments(self, pieces: list[Piece]) -> bool:
        end = self._end_of_arguments()
        text = self._pending if end is None else self._pending[:end]
        if text:
            pieces.append(Arguments(self.num_calls - 1, text))
        self._pending = self._pending[len(text) :]
        if end is None:
            return False
        self._state = "tail"
        return True

    def _end_of_arguments(self) -> int | None:
        """Return where in what is pending the JSON object ends; None if it goes on."""
        place = 0
        if self._is_escaped and self._pending:
            self._is_escaped = False
            place = 1
        while (found := _NOTABLE.search(self._pending, place)) is not None:
            place = found.end()
            character = found[0]
            if character == '"':
                self._in_string = not self._in_string
            elif self._in_string:
                if character == "\\":
                    self._is_escaped = place == len(self._pending)
                    place += 1
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return place
        return None
