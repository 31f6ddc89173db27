"""The plot of a plan. It needs matplotlib, which comes with the extra ``bench``."""

from __future__ import annotations

from pathlib import Path

from chiasm.bench.goodput import TARGET
from chiasm.errors import ConfigurationError
from chiasm.extras import explained
from chiasm.launch.layout import Layout
from chiasm.plan.report import Plan, shown

_COLOURS = {Layout.COLOCATED: "#2b6cb0", Layout.SPLIT: "#b7791f", Layout.AGGREGATED: "#718096"}
_BAR_INCHES, _MARGIN_INCHES, _WIDTH_INCHES = 0.32, 1.6, 11.0


def write_plot(path: Path, plan: Plan) -> None:
    """Write a PNG: a bar for each candidate, its rate or its share in time. Raises ConfigurationError."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise explained(error, "--plot") or error from error
    searched = plan.workload.rate is None
    ordered = sorted(plan.findings, key=lambda one: one.rate if searched else one.attained)
    canvas = Figure(figsize=(_WIDTH_INCHES, _MARGIN_INCHES + _BAR_INCHES * len(ordered)), dpi=110, layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.add_subplot()
    values = [one.rate if searched else 100 * one.attained for one in ordered]
    axes.barh(
        [one.candidate.name for one in ordered], values, color=[_COLOURS[one.candidate.layout] for one in ordered]
    )
    for place, (one, value) in enumerate(zip(ordered, values, strict=True)):
        axes.annotate(
            f" {shown(value)}{'' if searched else ' %'} ({one.limited_by})", (value, place), va="center", fontsize=8
        )
    if not searched:
        axes.axvline(100 * TARGET, color="#30343b", lw=0.8, ls=":")
    axes.set_xlim(0, 1.25 * max([*values, 1e-9]))
    axes.set_xlabel(f"requests per second, {TARGET:.0%} in time" if searched else "% in time", fontsize=8)
    axes.set_title(f"{plan.model} on {plan.devices}: {plan.workload.traffic.name}", loc="left", fontsize=10)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    try:
        canvas.savefig(path, format="png")
    except OSError as error:
        raise ConfigurationError(f"The plot cannot be written to {path}: {error}.") from error
