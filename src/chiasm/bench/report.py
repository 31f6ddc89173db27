"""Tables for people and JSON for programs."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chiasm import __version__
from chiasm.bench.measurement import Figure, Measurement, Outcome

if TYPE_CHECKING:
    from rich.console import Console

FORMAT_VERSION = 1


def machine() -> dict[str, Any]:
    """Return what the figures were measured on."""
    import psutil

    from chiasm.cores import usable_cores

    return {
        "cpu": _cpu(),
        "cores": usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "load_average": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": _version("torch"),
        "transformers": _version("transformers"),
        "vllm": _version("vllm"),
        "chiasm": __version__,
    }


def write_json(path: Path, outcomes: Mapping[str, Outcome], about: Mapping[str, Any]) -> None:
    """Write figures, targets, notes and all samples; ``about`` says how and on what they were measured."""
    measurements = {}
    for name, outcome in outcomes.items():
        measurements[name] = asdict(outcome) | {
            "met": outcome.met,
            "figures": [asdict(figure) | {"met": figure.met} for figure in outcome.figures],
        }
    content = {"format": FORMAT_VERSION, **about, "measurements": measurements}
    # A file that was there is replaced in one step, since a measurement writes what it has again and again.
    new = path.with_suffix(".new")
    new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    new.replace(path)


def print_outcome(console: Console, measurement: Measurement, outcome: Outcome) -> None:
    """Print the table of a measurement, then its notes."""
    from rich.table import Table
    from rich.text import Text

    console.print(Text(measurement.name, style="bold"), Text(measurement.purpose), sep=": ")
    console.print(Text(f"target: {measurement.target}"))
    table = Table()
    table.add_column("figure", overflow="fold")
    for column in ("value", "95% of resamplings", "target"):
        table.add_column(column, justify="right")
    table.add_column("met")
    for figure in outcome.figures:
        between = "" if figure.low is None or figure.high is None else f"{shown(figure.low)} … {shown(figure.high)}"
        table.add_row(
            Text(figure.name), with_unit(figure.value, figure.unit), between, _limit(figure), _verdict(figure)
        )
    console.print(table)
    for note in outcome.notes:
        console.print(Text(f"  {note}", style="dim"))
    console.print(Text(f"  It took {_duration(outcome.seconds)}.", style="dim"))
    console.print()


def shown(value: float) -> str:
    """Return the value with three significant digits."""
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def with_unit(value: float, unit: str) -> str:
    """Return the value with its unit."""
    return f"{value:.2f}x" if unit == "x" else f"{shown(value)} {unit}".rstrip()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _limit(figure: Figure) -> str:
    if figure.at_least is not None:
        return f"≥ {with_unit(figure.at_least, figure.unit)}"
    return "" if figure.at_most is None else f"≤ {with_unit(figure.at_most, figure.unit)}"


def _verdict(figure: Figure) -> str:
    return {None: "", True: "[green]yes[/green]", False: "[bold red]no[/bold red]"}[figure.met]


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None
