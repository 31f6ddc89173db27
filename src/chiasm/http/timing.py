"""``Server-Timing``: where the time of a request went. Durations are milliseconds on the wire and seconds everywhere else."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

_MAX_CHARACTERS = 8192
_MAX_SECONDS = 1e9
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_VALUE = rf'(?:"(?:[^"\\]|\\.)*"|{_TOKEN})'
_ENTRY = re.compile(rf"\s*({_TOKEN})((?:\s*;\s*{_TOKEN}\s*=\s*{_VALUE})*)\s*(?:,|$)")
_PARAMETER = re.compile(rf";\s*({_TOKEN})\s*=\s*({_VALUE})")
_USUAL = re.compile(rf"({_TOKEN})" r'(?:;desc="([^"\\]*)")?' r"(?:;dur=([0-9.]{1,20}))?(?:;at=([0-9.]{1,20}))?(?:, |$)")
"""An entry as ``write_timing`` writes it, without what has to be escaped."""
_ALL_USUAL = re.compile(rf"(?:{_USUAL.pattern})*")
_ESCAPED = re.compile(r"\\(.)")


class TimingEntry(NamedTuple):
    """One metric."""

    name: str
    seconds: float | None = None
    description: str = ""
    at: float | None = None
    """When it began, in seconds from the arrival of the request at the server that tells it; None if it isn't told."""


def write_timing(entries: Iterable[TimingEntry]) -> str:
    """Return the header's value."""
    return ", ".join(_written(entry) for entry in entries)


def read_timing(header: str | None) -> list[TimingEntry]:
    """Return the entries of a header; what isn't well-formed is left out, and a header of absurd length is empty."""
    if not header or len(header) > _MAX_CHARACTERS:
        return []
    if _ALL_USUAL.fullmatch(header):
        return [
            TimingEntry(name, _seconds(dur) if dur else None, description, _seconds(at) if at else None)
            for name, description, dur, at in _USUAL.findall(header)
        ]
    entries: list[TimingEntry] = []
    at = 0
    while at < len(header):
        match = _ENTRY.match(header, at)
        if match is None:
            comma = header.find(",", at)
            at = comma + 1 if comma >= 0 else len(header)
            continue
        entries.append(_read(match[1], match[2]))
        at = match.end()
    return entries


def duration_seconds(header: str | None, name: str) -> float | None:
    """Return the duration of the first entry of this name."""
    return duration_of(read_timing(header), name)


def duration_of(entries: Iterable[TimingEntry], name: str) -> float | None:
    """The same of entries that were read."""
    return next((entry.seconds for entry in entries if entry.name == name), None)


def _written(entry: TimingEntry) -> str:
    text, seconds, description, at = entry
    if description:
        quoted = description.replace("\\", "\\\\").replace('"', '\\"')
        text += f';desc="{quoted}"'
    if seconds is not None:
        text += f";dur={seconds * 1000:.3f}"
    if at is not None:
        text += f";at={at * 1000:.3f}"
    return text


def _read(name: str, parameters: str) -> TimingEntry:
    seconds = at = None
    description = ""
    for key, value in _PARAMETER.findall(parameters):
        bare = _ESCAPED.sub(r"\1", value[1:-1]) if value.startswith('"') else value
        if key.lower() == "desc":
            description = bare
        elif key.lower() == "dur":
            seconds = _seconds(bare)
        elif key.lower() == "at":
            at = _seconds(bare)
    return TimingEntry(name, seconds, description, at)


def _seconds(milliseconds: str) -> float | None:
    """Return a duration, or None for what is none: it may be not a number, negative, or longer than any request takes."""
    try:
        seconds = float(milliseconds) / 1000
    except ValueError:
        return None
    return seconds if 0 <= seconds <= _MAX_SECONDS else None
