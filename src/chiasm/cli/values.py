"""What a person writes for a size or a set of CPUs, and what it means."""

from __future__ import annotations

import re
import shlex

import typer

_UNITS = {
    "": 1,
    "b": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)},
    **{letter: 1024**power for power, letter in enumerate("kmgt", 1)},
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)")


class CpuSet(tuple[int, ...]):
    """CPU numbers, sorted; a class of its own, since typer takes a tuple for an option with several values."""


class Names(tuple[str, ...]):
    """Names in the order given; a class of its own for the same reason."""


def parse_size(text: str) -> int:
    """Bytes of ``512MiB``, ``512M`` (the same), ``1.5GB`` (decimal) or ``1048576``."""
    match = _SIZE.fullmatch(text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise typer.BadParameter(f"{text!r} is not a size; write bytes, or a number with KiB, MiB, GiB, kB, MB or GB")
    return int(float(match[1]) * _UNITS[match[2]])


def parse_cpus(text: str) -> CpuSet:
    """The CPUs of ``0,2-3``."""
    cpus: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not dash:
            last = first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            raise typer.BadParameter(f"{text!r} is not a set of CPUs; write for example 0,2-3")
        cpus.update(range(int(first), int(last) + 1))
    return CpuSet(sorted(cpus))


def parse_names(text: str) -> Names:
    """The names of ``0,1`` or ``GPU-1a2b,GPU-3c4d``."""
    names = Names(name.strip() for name in text.split(","))
    if not all(names):
        raise typer.BadParameter(f"{text!r} is not a list of devices; write for example 0,1")
    return names


def parse_arguments(text: str) -> Names:
    """The arguments of a command line, quoted as for a shell."""
    try:
        return Names(shlex.split(text))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a command line: {error}") from None
