"""How findings are shown: to a person, line by line as they come, or to a program as JSON."""

from __future__ import annotations

import json
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, TextIO

from chiasm.doctor.base import Finding, Verdict, has_problem

if TYPE_CHECKING:
    from rich.console import Console

_COLOURS = {Verdict.OK: "green", Verdict.WARNING: "yellow", Verdict.PROBLEM: "bold red", Verdict.SKIPPED: "dim"}
_NAME_WIDTH = 22
_VERDICT_WIDTH = 9
_INDENT = " " * (_VERDICT_WIDTH + 2)
_WIDTH = 120


class Report:
    """One line a finding; what to do about it below. Plain text, with colours where the stream is a terminal."""

    def __init__(self, stream: TextIO = sys.stdout) -> None:
        self._stream = stream
        self._console: Console | None = None
        if stream.isatty():
            from rich.console import Console

            self._console = Console(file=stream, highlight=False)

    def show(self, finding: Finding) -> None:
        verdict = f"{finding.verdict:<{_VERDICT_WIDTH}}"
        self._line(f"{verdict} {finding.check:<{_NAME_WIDTH}} {finding.says}", finding.verdict)
        for name, said in (("why", finding.why), ("do", finding.do)):
            if said:
                self._wrapped(f"{name + ':':<5}{said}", " " * 5)
        if finding.command:
            self._line(f"{_INDENT}     {finding.command}")

    def end(self, findings: Sequence[Finding]) -> None:
        """The last line."""
        self._line(summary(findings))

    def _wrapped(self, text: str, indent: str) -> None:
        for line in textwrap.wrap(
            text, _WIDTH, initial_indent=_INDENT, subsequent_indent=_INDENT + indent, break_on_hyphens=False
        ):
            self._line(line)

    def _line(self, line: str, verdict: Verdict | None = None) -> None:
        if self._console is None:
            print(line, file=self._stream, flush=True)
            return
        from rich.text import Text

        text = Text(line)
        if verdict is not None:
            text.stylize(_COLOURS[verdict], 0, _VERDICT_WIDTH)
        self._console.print(text, soft_wrap=True)


def summary(findings: Sequence[Finding]) -> str:
    """How many of each verdict there are."""
    counts = Counter(finding.verdict for finding in findings)
    named = [
        f"{counts[verdict]} {name if counts[verdict] == 1 else plural}"
        for verdict, name, plural in (
            (Verdict.PROBLEM, "problem", "problems"),
            (Verdict.WARNING, "warning", "warnings"),
            (Verdict.OK, "ok", "ok"),
            (Verdict.SKIPPED, "skipped", "skipped"),
        )
        if counts[verdict]
    ]
    return ", ".join(named)


def as_json(findings: Sequence[Finding]) -> str:
    """``{"problems": …, "findings": […]}``; a finding has the fields of :class:`Finding`."""
    return json.dumps({"problems": has_problem(findings), "findings": [asdict(one) for one in findings]}, indent=2)
