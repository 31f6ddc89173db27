"""The results of checks, and how they are printed: line by line as they come for a person, or as JSON for a program.

A check is a function that yields results. It takes what it examines as arguments, so that each can be tested alone. A check
that can't be made is *skipped* and says why: nothing that wasn't examined is called ok.
"""

from __future__ import annotations

import enum
import json
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, TextIO

from chiasm.errors import ChiasmError
from chiasm.findings import Finding

if TYPE_CHECKING:
    from rich.console import Console

_NAME_WIDTH = 22
_VERDICT_WIDTH = 9
_INDENT = " " * (_VERDICT_WIDTH + 2)
_WIDTH = 120
_SHOWN_CHARACTERS = 200
_USER = re.compile(r"(?<=://)[^/@\s]*@")


class Verdict(enum.StrEnum):
    """What a result means for whoever runs the deployment."""

    OK = "ok"
    WARNING = "warning"
    """It works, or may work, but not as it should."""
    PROBLEM = "problem"
    """It doesn't work, or wouldn't."""
    SKIPPED = "skipped"
    """It couldn't be checked, or doesn't apply here."""


_COLOURS = {Verdict.OK: "green", Verdict.WARNING: "yellow", Verdict.PROBLEM: "bold red", Verdict.SKIPPED: "dim"}


@dataclass(frozen=True)
class Result:
    """One line of the report; warnings and problems are explained below it."""

    check: str
    verdict: Verdict
    says: str
    """What the check has found."""
    why: str = ""
    """Why it matters."""
    do: str = ""
    """What to do about it."""
    command: str = ""
    """A command to copy, where there is one."""


@dataclass(frozen=True)
class Check:
    """A check's name, and constructors of its results."""

    name: str

    def ok(self, says: str) -> Result:
        return Result(self.name, Verdict.OK, says)

    def skipped(self, says: str) -> Result:
        """``says`` is why nothing was checked."""
        return Result(self.name, Verdict.SKIPPED, says)

    def warning(self, says: str, why: str, do: str, command: str = "") -> Result:
        return Result(self.name, Verdict.WARNING, says, why, do, command)

    def problem(self, says: str, why: str, do: str, command: str = "") -> Result:
        return Result(self.name, Verdict.PROBLEM, says, why, do, command)

    def problems(self, findings: Iterable[Finding], why: str) -> Iterator[Result]:
        """Yield the findings of a check that instances make when they start."""
        for finding in findings:
            yield self.problem(finding.problem, why, f"{finding.advice}.")

    def refused(
        self, error: ChiasmError, do: str, command: str = "", why: str = "the deployment would refuse to start."
    ) -> Result:
        """Return the problem that a check of the start raises as an error."""
        return self.problem(error.message, why, do, command)


def has_problem(results: Iterable[Result]) -> bool:
    return any(result.verdict is Verdict.PROBLEM for result in results)


def shown(said: object, max_characters: int = _SHOWN_CHARACTERS) -> str:
    """Return text of unknown origin as one printable line of bounded length, without the passwords in URLs."""
    text = " ".join(str(said)[: 4 * max_characters].split())
    text = _USER.sub("***@", "".join(letter if letter.isprintable() else "?" for letter in text))
    return text if len(text) <= max_characters else text[:max_characters] + "…"


def size(count_bytes: float) -> str:
    """Return a number of bytes as a person reads it: ``1.5 GiB``."""
    for unit in ("bytes", "KiB", "MiB"):
        if count_bytes < 1024:
            return f"{count_bytes:.0f} {unit}" if unit == "bytes" else f"{count_bytes:.1f} {unit}"
        count_bytes /= 1024
    return f"{count_bytes:.1f} GiB"


class Report:
    """Prints one line for each result, and what to do about it below. There are colours if the stream is a terminal."""

    def __init__(self, stream: TextIO = sys.stdout) -> None:
        self._stream = stream
        self._console: Console | None = None
        if stream.isatty():
            from rich.console import Console

            self._console = Console(file=stream, highlight=False)

    def show(self, result: Result) -> None:
        self._print(f"{result.verdict:<{_VERDICT_WIDTH}} {result.check:<{_NAME_WIDTH}} {result.says}", result.verdict)
        for name, text in (("why:", result.why), ("do:", result.do)):
            if text:
                for line in textwrap.wrap(
                    f"{name:<5}{text}",
                    _WIDTH,
                    initial_indent=_INDENT,
                    subsequent_indent=_INDENT + " " * 5,
                    break_on_hyphens=False,
                ):
                    self._print(line)
        if result.command:
            self._print(f"{_INDENT}     {result.command}")

    def end(self, results: Sequence[Result]) -> None:
        """Print the last line."""
        self._print(summary(results))

    def _print(self, line: str, verdict: Verdict | None = None) -> None:
        if self._console is None:
            print(line, file=self._stream, flush=True)
            return
        from rich.text import Text

        text = Text(line)
        if verdict is not None:
            text.stylize(_COLOURS[verdict], 0, _VERDICT_WIDTH)
        self._console.print(text, soft_wrap=True)


def summary(results: Sequence[Result]) -> str:
    """Return how many results there are of each verdict."""
    counts = Counter(result.verdict for result in results)
    plurals = {Verdict.PROBLEM: "problems", Verdict.WARNING: "warnings", Verdict.OK: "ok", Verdict.SKIPPED: "skipped"}
    return ", ".join(
        f"{counts[verdict]} {verdict if counts[verdict] == 1 else plural}"
        for verdict, plural in plurals.items()
        if counts[verdict]
    )


def as_json(results: Sequence[Result]) -> str:
    """Return ``{"problems": …, "findings": […]}``; a finding has the fields of :class:`Result`."""
    return json.dumps({"problems": has_problem(results), "findings": [asdict(one) for one in results]}, indent=2)
