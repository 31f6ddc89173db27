"""Finds, in the log of a server that has ended, the line that says why."""

from __future__ import annotations

import re
from collections.abc import Sequence

_LONGEST = 600
# "(EngineCore pid=123) ERROR 11-24 02:21:42 [core.py:1510] " before what a process of vLLM's says.
_PREFIX = re.compile(r"^(?:\([\w ]+ pid=\d+\) )?(?:(?:ERROR|CRITICAL) [\d-]+ [\d:.]+ \[[^\]]*\] ?)?")
_USAGE = re.compile(r"^[\w.\- ]+: error: (?P<said>.+)")
_RAISED = re.compile(r"^(?P<kind>(?:\w+\.)*\w*(?:Error|Exception|Exit|Interrupt))(?:: (?P<said>.*))?$")
# One process of vLLM's says of another that it has failed; that one has said why.
_SECOND_HAND = ("Engine core initialization failed", "Worker failed with error", "WorkerProc initialization failed")
_VALIDATION = re.compile(r"\d+ validation errors? for ")
_VALUE = re.compile(r"^\s+(?:Value error, )?(?P<said>.+?)(?: \[type=.*)?$")


def decisive_line(lines: Sequence[str]) -> str | None:
    """The last error that is not said of another; None where there is none."""
    said = [_PREFIX.sub("", line, count=1) for line in lines]
    found: str | None = None
    second_hand: str | None = None
    for number, line in enumerate(said):
        if usage := _USAGE.match(line):
            found = usage["said"]
        elif raised := _RAISED.match(line):
            text = (raised["said"] or "").strip()
            if _VALIDATION.match(text):
                text = _first_value(said[number + 1 :]) or text
            if text.startswith(_SECOND_HAND):
                second_hand = text
            else:
                found = text or raised["kind"].rpartition(".")[2]
    chosen = found or second_hand
    return chosen[:_LONGEST] if chosen else None


def _first_value(lines: Sequence[str]) -> str | None:
    """What pydantic has to say, below its headline."""
    for line in lines[:2]:
        if match := _VALUE.match(line):
            return match["said"]
    return None
