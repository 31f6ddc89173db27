"""What a plan shows: a table, what to do in a sentence, and how to start it; or all of it as JSON."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from chiasm.bench.goodput import TARGET
from chiasm.launch.layout import in_words
from chiasm.plan.layouts import Candidate
from chiasm.plan.search import Finding, WholeTrace, Workload
from chiasm.plan.sharing import Stage
from chiasm.wire import Role

_WIDTH = 116
"""Columns of a terminal that the table needs."""


@dataclass(frozen=True)
class Plan:
    """Everything that was found."""

    model: str
    devices: str
    workload: Workload
    findings: Sequence[Finding]
    left_out: Sequence[tuple[Candidate, str]]
    """Candidates that don't fit, each with what doesn't."""
    best: Finding

    @property
    def met(self) -> bool:
        """Whether the best of them answers enough requests in time."""
        return self.best.rate > 0 and self.best.attained >= TARGET

    @property
    def command(self) -> str:
        """Starts the best of them."""
        return f"chiasm serve {shlex.quote(self.model)} {self.best.candidate.options}"

    @property
    def sentence(self) -> str:
        best, name = self.best, self.workload.traffic.name
        counts = in_words(best.candidate.counts)
        if not self.met:
            at = (
                f" at {shown(best.rate)} requests per second" if best.rate else ", even when hardly any request arrives"
            )
            return (
                f"Nothing on {self.devices} answers {TARGET:.0%} of {name} in time{at}: the best, {best.candidate.layout} with "
                f"{counts}, answers {best.attained:.0%}, limited by {best.limited_by}. Allow more time, or add devices."
            )
        others = [one for one in self.findings if one.candidate.layout is not best.candidate.layout]
        if self.workload.rate is None:
            found = (
                f"answers {TARGET:.0%} of {name} in time up to {shown(best.rate)} requests per second{self._own_rate}"
            )
            next_best = max(others, key=lambda one: one.rate, default=None)
            gain = (
                f"; the best {next_best.candidate.layout} layout reaches {shown(next_best.rate)}" if next_best else ""
            )
        else:
            found = f"answers {best.attained:.0%} of {name} in time at {shown(best.rate)} requests per second"
            next_best = max(others, key=lambda one: one.attained, default=None)
            gain = (
                f"; the best {next_best.candidate.layout} layout answers {next_best.attained:.0%}" if next_best else ""
            )
        return f"On {self.devices} use {best.candidate.layout} with {counts}: it {found}{gain}."

    @property
    def _own_rate(self) -> str:
        traffic = self.workload.traffic
        return f" (the trace has {shown(traffic.trace.rate)})" if isinstance(traffic, WholeTrace) else ""


def print_plan(plan: Plan, *, as_json: bool) -> None:
    """Print the plan on standard output."""
    if as_json:
        print(json.dumps(to_json(plan), indent=1))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    console.width = max(console.width, _WIDTH)
    table = Table()
    for title in ("layout", "instances"):
        table.add_column(title, no_wrap=True)
    for title in ("req/s", "in time", "TTFT ms", "TPOT ms", "device-s/1000", "busy E P D"):
        table.add_column(title, justify="right")
    table.add_column("limit")
    for one in sorted(plan.findings, key=lambda one: (-one.rate, -one.attained)):
        table.add_row(
            str(one.candidate.layout),
            Text(_short(one.candidate), style="bold" if one is plan.best else ""),
            shown(one.rate) if one.rate else "none",
            f"{one.attained:.0%}",
            f"{one.ttft_seconds * 1000:.0f}",
            f"{one.tpot_seconds * 1000:.1f}",
            f"{one.device_seconds:.0f}" if one.device_seconds else "",
            " ".join(f"{100 * one.busy[stage]:.0f}" for stage in _SHOWN) + " %",
            one.limited_by,
        )
    console.print(table)
    console.print(
        Text("TTFT and TPOT: 90th percentile. Busy: share of the devices' time for encode, prefill and decode.")
    )
    for candidate, reason in plan.left_out:
        console.print(Text(f"Left out: {candidate.name}, since {reason}."))
    console.print(Text(plan.sentence))
    if plan.met:
        console.print(Text(f"  {plan.command}"), soft_wrap=True)


_SHOWN = (Stage.ENCODE, Stage.PREFILL, Stage.DECODE)
_LETTERS = {Role.ENCODER: "E", Role.PREFILL: "P", Role.DECODE: "D", Role.PD: "PD", Role.AGGREGATED: "EPD"}


def _short(candidate: Candidate) -> str:
    return " + ".join(f"{count} {_LETTERS[role]}" for role, count in candidate.counts.items())


def to_json(plan: Plan) -> dict[str, Any]:
    """Return the plan as JSON; times in seconds."""
    return {
        "format": 1,
        "model": plan.model,
        "devices": plan.devices,
        "traffic": plan.workload.traffic.name,
        "seed": plan.workload.seed,
        "met": plan.met,
        "recommendation": plan.sentence,
        "command": plan.command if plan.met else None,
        "candidates": [_finding(one) for one in plan.findings],
        "left_out": [{"candidate": candidate.name, "reason": reason} for candidate, reason in plan.left_out],
    }


def _finding(one: Finding) -> dict[str, Any]:
    return {
        "layout": one.candidate.layout,
        "instances": {str(role): count for role, count in one.candidate.counts.items()},
        "serve_options": one.candidate.options,
        "requests_per_second": one.rate,
        "attained": one.attained,
        "ttft_p90_seconds": one.ttft_seconds,
        "tpot_p90_seconds": one.tpot_seconds,
        "device_seconds_per_1000_requests": one.device_seconds,
        "busy": {str(stage): share for stage, share in one.busy.items()},
        "limited_by": one.limited_by,
        "tried": [{"requests_per_second": rate, "attained": share} for rate, share in one.curve],
    }


def shown(value: float) -> str:
    """Return the value with three significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
