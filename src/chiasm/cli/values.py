"""What a person writes for a size or a set of CPUs, and what it means."""

from __future__ import annotations

import re

import typer

_UNITS = {
    "": 1,
    "b": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)},
    **{letter: 1024**power for power, letter in enumerate("kmgt", 1)},
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)")


def parse_size(text: str) -> int:
    """Bytes of ``512MiB``, ``512M`` (the same), ``1.5GB`` (decimal) or ``1048576``."""
    match = _SIZE.fullmatch(text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise typer.BadParameter(f"{text!r} is not a size; write bytes, or a number with KiB, MiB, GiB, kB, MB or GB")
    return int(float(match[1]) * _UNITS[match[2]])


def parse_cpus(text: str) -> tuple[int, ...]:
    """CPU numbers of ``0,2-3``, sorted."""
    cpus: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise typer.BadParameter(f"{text!r} is not a set of CPUs; write for example 0,2-3")
        cpus.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(cpus))
