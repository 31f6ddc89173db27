"""The plot of a run. It needs matplotlib, which comes with the extra ``bench``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from chiasm.bench.measurement import Curves, Figure, Outcome, Panel, TimeLines
from chiasm.bench.report import shown, with_unit
from chiasm.bench.statistics import median, quantile

_COLUMNS, _NARROW_COLUMNS = 2, 3
_INK = "#30343b"
_BLUE, _RED, _GREEN = "#2b6cb0", "#c53030", "#2f855a"
_COLOURS = ("#718096", _BLUE, "#b7791f", "#6b46c1")
_TAIL_SHARE = 0.99
_DRAWN_SHARE = 0.95
"""Share of the samples that the axis makes room for, so that a few outliers don't squeeze all others together."""
_LABELLED = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
"""Multiples of powers of ten."""
# In inches:
_WIDTH, _TITLE, _BELOW, _RIGHT = 13.0, 0.9, 1.0, 0.3
_LABEL, _NARROW_LABEL, _WIDEST_LABEL = 1.75, 0.75, 4.2
_LEAST_HEIGHT, _CURVES_HEIGHT = 1.9, 2.6


def write_plot(path: Path, outcomes: Mapping[str, Outcome], title: str) -> None:
    """Write a PNG file: all figures that have targets, then the samples of each measurement."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    judged = [(name, one) for name, outcome in outcomes.items() for one in outcome.figures if _has_target_to_draw(one)]
    panels = [panel for outcome in outcomes.values() for panel in outcome.panels]
    rows = list(_rows(panels))
    of_targets = [0.5 + 0.3 * max(2, len(judged))] if judged or not rows else []
    heights = [*of_targets, *(_height(row) for row in rows)]
    *tops, total = itertools.accumulate((height + _BELOW for height in heights), initial=_TITLE)
    canvas = Canvas(figsize=(_WIDTH, total), dpi=110)
    FigureCanvasAgg(canvas)
    canvas.text(0.5, 1 - 0.25 / total, title, ha="center", va="center", fontsize=12, color=_INK)

    def axes_at(left: float, top: float, width: float, height: float) -> Any:
        """Return axes at a place in inches from the left and from the top."""
        axes = canvas.add_axes((left / _WIDTH, 1 - (top + height) / total, width / _WIDTH, height / total))
        axes.spines[["top", "right"]].set_visible(False)
        return axes

    if of_targets:
        _draw_targets(axes_at(_WIDEST_LABEL, tops.pop(0), _WIDTH - _WIDEST_LABEL - _RIGHT, heights.pop(0)), judged)
    for row, top, height in zip(rows, tops, heights, strict=True):
        narrow = isinstance(row[0], Curves)
        column, label = (_WIDTH / _NARROW_COLUMNS, _NARROW_LABEL) if narrow else (_WIDTH / _COLUMNS, _LABEL)
        for place, panel in enumerate(row):
            axes = axes_at(place * column + label, top, column - label - _RIGHT, height)
            axes.set_title(panel.title, loc="left", fontsize=10, fontweight="bold", color=_INK)
            if isinstance(panel, Curves):
                _draw_curves(axes, panel)
            elif isinstance(panel, TimeLines):
                _draw_lines(axes, panel)
            else:
                (_draw_tail if panel.tail else _draw_spread)(axes, panel)
    canvas.savefig(path)


def _rows(panels: Sequence[Panel | Curves | TimeLines]) -> Iterator[list[Panel | Curves | TimeLines]]:
    """Yield what stands beside each other, in order; curves are narrower than the rest, and so more of them."""
    for narrow, some in itertools.groupby(panels, lambda panel: isinstance(panel, Curves)):
        left = list(some)
        number = _NARROW_COLUMNS if narrow else _COLUMNS
        yield from (left[start : start + number] for start in range(0, len(left), number))


def _height(row: Sequence[Panel | Curves | TimeLines]) -> float:
    return max(
        _CURVES_HEIGHT if isinstance(panel, Curves | TimeLines) else max(_LEAST_HEIGHT, 0.4 + 0.42 * len(panel.series))
        for panel in row
    )


def _has_target_to_draw(figure: Figure) -> bool:
    """Tell whether a figure has a target, and its ratio to the target doesn't divide by zero."""
    return bool(figure.value > 0 if figure.at_least else figure.at_most)


def _share(figure: Figure, value: float) -> float:
    """Return the ratio of ``value`` to the target; inverted if larger is better, so that below 1 is always met."""
    if figure.at_least:
        return figure.at_least / value if value > 0 else math.inf
    assert figure.at_most
    return value / figure.at_most


def _draw_targets(axes: Any, judged: Sequence[tuple[str, Figure]]) -> None:
    """Draw a bar for each ratio of a value to its target."""
    axes.set_title(
        "values relative to their targets; left of the line is met", loc="left", fontsize=10, fontweight="bold"
    )
    widest = 1.35 * max([1.0, *(_share(figure, figure.value) for _, figure in judged)])
    for row, (_, figure) in enumerate(judged):
        share = furthest = _share(figure, figure.value)
        axes.barh(row, share, color=_GREEN if figure.met else _RED, height=0.6)
        if figure.low is not None and figure.high is not None:
            ends = sorted(min(_share(figure, end), widest) for end in (figure.low, figure.high))
            axes.plot(ends, [row, row], color=_INK, lw=1.2)
            furthest = max(share, ends[1])
        target = figure.at_least or figure.at_most
        assert target
        text = f" {with_unit(figure.value, figure.unit)} of {with_unit(target, figure.unit)}"
        axes.text(min(furthest, 0.9 * widest), row, text, va="center", fontsize=8, color=_INK)
    axes.axvline(1, color=_INK, lw=1, ls="--")
    axes.set_yticks(range(len(judged)), [f"{name}: {figure.name}" for name, figure in judged], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, widest)
    axes.set_xlabel("value / target", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)


def _draw_spread(axes: Any, panel: Panel) -> None:
    """Draw every sample as a dot, the median as a line, the target as a triangle."""
    generator = np.random.default_rng(0)
    kinds = list(dict.fromkeys(_kind(series.label) for series in panel.series))
    for row, series in enumerate(panel.series):
        colour = _COLOURS[kinds.index(_kind(series.label)) % len(_COLOURS)]
        heights = row + generator.uniform(-0.22, 0.22, len(series.values)) * (len(series.values) > 1)
        axes.plot(series.values, heights, "o", ms=3.2, alpha=0.45, color=colour, mew=0)
        middle = median(series.values)
        axes.plot([middle, middle], [row - 0.34, row + 0.34], color=colour, lw=2.2)
        axes.annotate(shown(middle), (middle, row - 0.36), fontsize=8, ha="center", va="bottom", color=colour)
        if series.at_most is not None:
            met = middle <= series.at_most
            axes.plot(series.at_most, row + 0.36, marker="^", ms=7, color=_GREEN if met else _RED, clip_on=False)
    axes.set_yticks(range(len(panel.series)), [series.label for series in panel.series], fontsize=8)
    axes.set_ylim(len(panel.series) - 0.45, -0.75)
    _scale(axes, panel)
    limits = [series.at_most for series in panel.series if series.at_most is not None]
    label = f"{panel.unit}; line: median" + (", triangle: target" if limits else "")
    if not panel.logarithmic:
        values = [value for series in panel.series for value in series.values]
        middles = [median(one.values) for one in panel.series]
        right = 1.15 * max([quantile(values, _DRAWN_SHARE), *limits, *middles])
        axes.set_xlim(1.15 * min([0.0, *middles]), right)
        if beyond := sum(value > right for value in values):
            label += f"; {beyond} of {len(values)} are further right"
    axes.set_xlabel(label, fontsize=8)


def _kind(label: str) -> str:
    """Return what decides the colour of a series: ``memcpy`` for both ``10 MB, memcpy`` and ``67 MB, memcpy``."""
    return label.rpartition(", ")[2]


def _draw_tail(axes: Any, panel: Panel) -> None:
    """Draw the share of the samples that are larger than each value."""
    for row, series in enumerate(panel.series):
        colour = _COLOURS[row % len(_COLOURS)]
        ordered = np.sort(np.asarray(series.values))
        shares = 1 - np.arange(len(ordered)) / len(ordered)
        last = quantile(series.values, _TAIL_SHARE)
        axes.step(ordered, shares, where="pre", color=colour, lw=1.6, label=f"{series.label} (p99 {shown(last)})")
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


def _draw_curves(axes: Any, panel: Curves) -> None:
    """Draw points, and the line that was fitted to them."""
    if not any(curve.points for curve in panel.curves):
        axes.set_axis_off()
        axes.text(0, 0.9, f"{panel.y_label}: no values", fontsize=8, color=_INK, va="top", transform=axes.transAxes)
        return
    for row, curve in enumerate(panel.curves):
        colour = _COLOURS[row % len(_COLOURS)]
        axes.plot(*_columns(curve.line), color=colour, lw=1.8, label=curve.label)
        axes.plot(*_columns(curve.points), "o", ms=3.5, alpha=0.55, color=colour, mew=0)
    if panel.target is None:
        axes.set_yscale("log")
        _label_ticks(axes.yaxis)
    else:
        axes.axhline(panel.target, color=_INK, lw=0.8, ls=":")
        axes.set_ylim(0, 1.03)
    axes.set_ylabel(panel.y_label, fontsize=8)
    axes.set_xlabel(panel.x_label, fontsize=8)
    axes.set_xscale("log")
    _label_ticks(axes.xaxis)
    axes.tick_params(axis="both", which="both", labelsize=8)
    axes.grid(color="#e2e8f0", lw=0.7)
    if panel.target is not None:  # elsewhere the colours are the same
        axes.legend(fontsize=7, frameon=False, loc="lower left")


def _label_ticks(axis: Any) -> None:
    """Label a logarithmic axis so densely that also one within a factor of two has labels."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=_LABELLED))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:g}")


def _draw_lines(axes: Any, panel: TimeLines) -> None:
    """Draw each line over time, and where the last half begins."""
    for row, curve in enumerate(panel.curves):
        colour, style = _COLOURS[row % len(_COLOURS)], "-" if row < len(_COLOURS) else "--"
        axes.plot(*_columns(curve.line), color=colour, lw=1.3, ls=style, label=curve.label)
    last = max(minutes for curve in panel.curves for minutes, _ in curve.line)
    axes.axvline(last / 2, color=_INK, lw=0.8, ls=":")
    axes.set_ylim(bottom=0)
    axes.set_xlabel(panel.x_label, fontsize=8)
    axes.set_ylabel(panel.unit, fontsize=8)
    axes.tick_params(axis="both", labelsize=8)
    axes.grid(color="#e2e8f0", lw=0.7)
    axes.legend(fontsize=8, frameon=False)


def _columns(pairs: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in pairs], [y for _, y in pairs]


def _logarithmic(axes: Any) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _scale(axes: Any, panel: Panel) -> None:
    if panel.logarithmic:
        _logarithmic(axes)
    axes.grid(axis="x", color="#e2e8f0", lw=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(axis="x", labelsize=8)
