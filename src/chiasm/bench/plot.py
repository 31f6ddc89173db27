"""The picture of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from chiasm.bench.outcome import Figure, Outcome, Panel
from chiasm.bench.report import with_unit
from chiasm.bench.statistics import median, quantile

_COLUMNS = 2
_INK = "#30343b"
_BLUE, _RED, _GREEN = "#2b6cb0", "#c53030", "#2f855a"
_COLOURS = ("#718096", _BLUE, "#b7791f", "#6b46c1")
_TAIL_SHARE = 0.99
_LEAST_HEIGHT = 2.6


def write_plot(path: Path, outcomes: Mapping[str, Outcome], title: str) -> None:
    """Draw every target with what was reached, then each measurement's samples, into a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    judged = [(name, one) for name, outcome in outcomes.items() for one in outcome.figures if one.at_most]
    panels = [panel for outcome in outcomes.values() for panel in outcome.panels]
    rows = math.ceil(len(panels) / _COLUMNS)
    heights = [0.6 + 0.3 * max(2, len(judged))]
    for row in range(rows):
        lines = max(len(panel.series) for panel in panels[row * _COLUMNS : (row + 1) * _COLUMNS])
        heights.append(max(_LEAST_HEIGHT, 0.8 + 0.42 * lines))
    canvas = Canvas(figsize=(13, sum(heights) + 0.8), layout="constrained", dpi=110)
    FigureCanvasAgg(canvas)
    canvas.suptitle(title, fontsize=12, color=_INK)
    grid = canvas.add_gridspec(1 + rows, _COLUMNS, height_ratios=heights)
    _draw_targets(canvas.add_subplot(grid[0, :]), judged)
    for index, panel in enumerate(panels):
        axes = canvas.add_subplot(grid[1 + index // _COLUMNS, index % _COLUMNS])
        axes.set_title(panel.title, loc="left", fontsize=10, fontweight="bold", color=_INK)
        axes.spines[["top", "right"]].set_visible(False)
        (_draw_tail if panel.tail else _draw_spread)(axes, panel)
    canvas.savefig(path)


def _draw_targets(axes: Any, judged: Sequence[tuple[str, Figure]]) -> None:
    """Each value over its target: what ends left of 1 is met."""
    axes.set_title("values over their targets: left of the line is met", loc="left", fontsize=10, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    for row, (_, figure) in enumerate(judged):
        assert figure.at_most
        share = figure.value / figure.at_most
        axes.barh(row, share, color=_GREEN if figure.met else _RED, height=0.6)
        if figure.low is not None and figure.high is not None:
            axes.plot([figure.low / figure.at_most, figure.high / figure.at_most], [row, row], color=_INK, lw=1.2)
        text = f" {with_unit(figure.value, figure.unit)} of {with_unit(figure.at_most, figure.unit)}"
        right = max(share, (figure.high or 0) / figure.at_most)
        axes.text(right, row, text, va="center", fontsize=8, color=_INK)
    axes.axvline(1, color=_INK, lw=1, ls="--")
    axes.set_yticks(range(len(judged)), [f"{name}: {figure.name}" for name, figure in judged], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, max([1.0, *(figure.value / (figure.at_most or 1) for _, figure in judged)]) * 1.2)
    axes.set_xlabel("value / target", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)


def _draw_spread(axes: Any, panel: Panel) -> None:
    """Every sample as a dot, its median as a line, its target as a triangle."""
    generator = np.random.default_rng(0)
    kinds = list(dict.fromkeys(_kind(series.label) for series in panel.series))
    for row, series in enumerate(panel.series):
        colour = _COLOURS[kinds.index(_kind(series.label)) % len(_COLOURS)]
        heights = row + generator.uniform(-0.22, 0.22, len(series.values)) * (len(series.values) > 1)
        axes.plot(series.values, heights, "o", ms=3.2, alpha=0.45, color=colour, mew=0)
        middle = median(series.values)
        axes.plot([middle, middle], [row - 0.34, row + 0.34], color=colour, lw=2.2)
        axes.annotate(f"{middle:.3g}", (middle, row - 0.36), fontsize=8, ha="center", va="bottom", color=colour)
        if series.at_most is not None:
            met = middle <= series.at_most
            axes.plot(series.at_most, row + 0.36, marker="^", ms=7, color=_GREEN if met else _RED, clip_on=False)
    axes.set_yticks(range(len(panel.series)), [series.label for series in panel.series], fontsize=8)
    axes.set_ylim(len(panel.series) - 0.45, -0.75)
    _scale(axes, panel)
    axes.set_xlabel(f"{panel.unit}; line: median, triangle: target", fontsize=8)


def _kind(label: str) -> str:
    """What series of different sizes have in common: ``10 MB, memcpy`` and ``67 MB, memcpy`` are of one colour."""
    return label.rpartition(", ")[2]


def _draw_tail(axes: Any, panel: Panel) -> None:
    """Which share of the samples is larger than a value."""
    for row, series in enumerate(panel.series):
        colour = _COLOURS[row % len(_COLOURS)]
        ordered = np.sort(np.asarray(series.values))
        shares = 1 - np.arange(len(ordered)) / len(ordered)
        last = quantile(series.values, _TAIL_SHARE)
        axes.step(ordered, shares, where="pre", color=colour, lw=1.6, label=f"{series.label} (p99 {last:.3g})")
        axes.plot(last, 1 - _TAIL_SHARE, "o", ms=5, color=colour)
        if series.at_most is not None:
            met = last <= series.at_most
            axes.plot(
                series.at_most, 1 - _TAIL_SHARE, "^", ms=7, color=_GREEN if met else _RED, label="target for its p99"
            )
    axes.axhline(1 - _TAIL_SHARE, color=_INK, lw=0.8, ls=":")
    axes.set_yscale("log")
    axes.set_ylabel("share of gaps that are longer", fontsize=8)
    axes.legend(fontsize=8, frameon=False)
    axes.tick_params(axis="y", labelsize=8)
    _scale(axes, panel)
    axes.set_xlabel(panel.unit, fontsize=8)


def _scale(axes: Any, panel: Panel) -> None:
    if panel.logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        axes.set_xlim(left=0)
    axes.grid(axis="x", color="#e2e8f0", lw=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(axis="x", labelsize=8)
