"""What a check finds, and how it is said.

A check is a function that yields findings. It takes what it looks at as arguments, so that each can be tested alone. What
cannot be looked at is *skipped*, and says why: nothing that wasn't seen is called ok.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable
from dataclasses import dataclass

_SHOWN_CHARACTERS = 200
_USER = re.compile(r"(?<=://)[^/@\s]*@")


class Verdict(enum.StrEnum):
    """What a finding means for whoever runs the deployment."""

    OK = "ok"
    WARNING = "warning"
    """It works, or may work, but not as it should."""
    PROBLEM = "problem"
    """It doesn't work, or would not."""
    SKIPPED = "skipped"
    """It could not be looked at, or doesn't apply here."""


@dataclass(frozen=True)
class Finding:
    """One line of the report; warnings and problems say more below it."""

    check: str
    verdict: Verdict
    says: str
    """What is so."""
    why: str = ""
    """Why it matters."""
    do: str = ""
    """What to do about it."""
    command: str = ""
    """To copy, where there is one."""


@dataclass(frozen=True)
class Check:
    """A check's name, and the findings that it makes."""

    name: str

    def ok(self, says: str) -> Finding:
        return Finding(self.name, Verdict.OK, says)

    def skipped(self, says: str) -> Finding:
        """``says`` is why nothing was looked at."""
        return Finding(self.name, Verdict.SKIPPED, says)

    def warning(self, says: str, *, why: str, do: str, command: str = "") -> Finding:
        return Finding(self.name, Verdict.WARNING, says, why, do, command)

    def problem(self, says: str, *, why: str, do: str, command: str = "") -> Finding:
        return Finding(self.name, Verdict.PROBLEM, says, why, do, command)


def has_problem(findings: Iterable[Finding]) -> bool:
    return any(finding.verdict is Verdict.PROBLEM for finding in findings)


def shown(said: object, most_characters: int = _SHOWN_CHARACTERS) -> str:
    """What somebody else said, fit for a terminal: one line of bounded length, nothing that steers, no password of a URL."""
    text = " ".join(str(said)[: 4 * most_characters].split())
    text = _USER.sub("***@", "".join(letter if letter.isprintable() else "?" for letter in text))
    return text if len(text) <= most_characters else text[:most_characters] + "…"


def size(count_bytes: float) -> str:
    """``1.5 GiB``."""
    for unit in ("bytes", "KiB", "MiB"):
        if count_bytes < 1024:
            return f"{count_bytes:.0f} {unit}" if unit == "bytes" else f"{count_bytes:.1f} {unit}"
        count_bytes /= 1024
    return f"{count_bytes:.1f} GiB"
