"""One plan from what a person asks for to what is shown."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from chiasm.errors import ConfigurationError
from chiasm.options import Option, flag
from chiasm.ownership import within_reach

if TYPE_CHECKING:
    from chiasm.bench.traffic import Traffic
    from chiasm.plan.costs import CostModel
    from chiasm.plan.devices import Device
    from chiasm.plan.layouts import Place
    from chiasm.plan.shapes import ModelShape

MET, UNMET = 0, 1
"""Exit codes: whether there is a layout that answers 90 % in time."""
_LEAST, _MOST = 1e-6, 1e6
_OF_A_MIX = ("requests", "seed")
_OF_A_PLAN = ("mix", "trace", "rate", "ttft_slo", "tpot_slo", "plot", *_OF_A_MIX)
"""Options of which `--check` uses none."""


@dataclass(frozen=True)
class PlanConfig:
    """What a plan is for."""

    model: str
    devices: Annotated[
        str, Option("What there is: 8xH100, 4xL4,2xH100, or cpu:2 for this machine's cores.", metavar="DEVICES")
    ] = "cpu"
    mix: Annotated[str | None, Option("A mix of `chiasm bench goodput`.", metavar="NAME")] = None
    trace: Annotated[Path | None, Option("Requests as `chiasm bench trace` takes them.", metavar="FILE")] = None
    rate: Annotated[
        float | None,
        Option("Requests per second.", min=_LEAST, max=_MOST, unset="search for the highest at which 90 % are in time"),
    ] = None
    ttft_slo: Annotated[
        float | None, Option("Longest time to the first token, in seconds.", min=_LEAST, max=_MOST, metavar="SECONDS")
    ] = None
    tpot_slo: Annotated[
        float | None, Option("Longest mean time per later token, in seconds.", min=_LEAST, max=_MOST, metavar="SECONDS")
    ] = None
    costs: Annotated[
        Path | None,
        Option(
            "File with costs measured on this machine's cores; made if it doesn't exist.",
            metavar="FILE",
            unset="one in ~/.cache/chiasm",
        ),
    ] = None
    calibrate: Annotated[bool, Option("Measure the costs again.")] = False
    requests: Annotated[
        int | None, Option("Requests in a trial of a mix.", min=1, max=100_000, unset="enough for the devices")
    ] = None
    seed: Annotated[int, Option("Seed of the mix.", min=0)] = 0
    plot: Annotated[Path | None, Option("PNG file for a plot, which needs the extra bench.", metavar="FILE")] = None
    json: Annotated[bool, Option("Print JSON instead of a table.")] = False
    check: Annotated[
        Path | None,
        Option("results.json of `chiasm bench goodput`: compare its rates with simulated ones.", metavar="FILE"),
    ] = None


def run(config: PlanConfig) -> int:
    """Make the plan and print it; return the exit code. Raises ConfigurationError."""
    from chiasm.plan import report
    from chiasm.plan.devices import parse_devices
    from chiasm.plan.layouts import Candidate, candidates, fitting, places_of
    from chiasm.plan.search import SEEDS, Finding, Planner, SameLimits, WholeTrace, Workload, best

    _refuse_unused(config)
    devices = parse_devices(config.devices)
    if config.check is not None:
        from chiasm.plan.check import check

        return check(config.check, *_model(config, devices), devices, as_json=config.json)
    traffic = _traffic(config)
    if config.ttft_slo is None or config.tpot_slo is None:
        raise ConfigurationError("Say what in time means: --ttft-slo and --tpot-slo, both in seconds.")
    shape, cost_of = _model(config, devices)
    workload = Workload(
        traffic,
        SameLimits(config.ttft_slo, config.tpot_slo),
        seed=config.seed,
        seeds=1 if isinstance(traffic, WholeTrace) else SEEDS,
        rate=config.rate,
        requests=config.requests,
    )
    planner = Planner(shape, workload, cost_of, places_of(devices))
    left_out: list[tuple[Candidate, str]] = []
    tried = fitting(
        candidates(devices), shape, planner.longest_tokens, lambda one, reason: left_out.append((one, reason))
    )
    findings: list[Finding] = []
    for number, candidate in enumerate(tried, 1):
        note(f"{number} of {len(tried)}: {candidate.name}")
        if config.rate is None:
            findings.append(planner.highest_rate(candidate))
        else:
            findings.append(planner.at_rate(candidate, config.rate))
    note("")
    plan = report.Plan(
        _served(config.model, shape),
        config.devices,
        workload,
        findings,
        left_out,
        best(findings, by_rate=config.rate is None),
    )
    report.print_plan(plan, as_json=config.json)
    if config.plot is not None:
        from chiasm.plan.plot import write_plot

        write_plot(config.plot, plan)
    return MET if plan.met else UNMET


def note(text: str) -> None:
    """Show on a terminal what is being done, in a line that the next one overwrites; nothing elsewhere."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


# ---- what the options mean ---------------------------------------------------------------------------------------------


def _refuse_unused(config: PlanConfig) -> None:
    """Raise ConfigurationError for options that would do nothing."""
    defaults = {field.name: field.default for field in fields(PlanConfig)}
    given = [name for name in _OF_A_PLAN if getattr(config, name) != defaults[name]]
    if config.check is not None and given:
        raise ConfigurationError(f"--check simulates what was measured; leave out {', '.join(map(flag, given))}.")
    unused = [flag(name) for name in given if name in _OF_A_MIX]
    if config.trace is not None and unused:
        raise ConfigurationError(f"--trace says which requests there are; leave out {' and '.join(unused)}.")


def _traffic(config: PlanConfig) -> Traffic:
    from chiasm.bench.traffic import MIXES

    if (config.mix is None) == (config.trace is None):
        raise ConfigurationError("Say what will be asked: either --mix NAME or --trace FILE.")
    if config.trace is not None:
        from chiasm.bench.trace import read_trace
        from chiasm.plan.search import WholeTrace

        return WholeTrace(read_trace(config.trace))
    if config.mix not in MIXES:
        raise ConfigurationError(f"There is no mix {config.mix!r}; the mixes are {', '.join(MIXES)}.")
    return MIXES[config.mix]


def _model(config: PlanConfig, devices: tuple[Device, ...]) -> tuple[ModelShape, Callable[[Place], CostModel]]:
    """Return the model's shape, and what gives each place its costs."""
    from chiasm.plan.devices import Cpu
    from chiasm.plan.search import computed_costs
    from chiasm.plan.shapes import well_known

    if isinstance(devices[0], Cpu):
        return _measured(config, devices[0])
    if config.costs is not None or config.calibrate:
        raise ConfigurationError(
            "--costs and --calibrate are for this machine's cores (--devices cpu:N); costs of GPUs are computed."
        )
    shape = well_known(config.model) or _shape_of_folder(config.model)
    return shape, computed_costs(shape)


def _served(model: str, shape: ModelShape) -> str:
    """Return what ``chiasm serve`` takes for a model: its name on the hub, if it was named without the owner."""
    return model if "/" in model or Path(model).exists() else shape.name


def _shape_of_folder(model: str) -> ModelShape:
    from chiasm.models.checkpoint import cached_folder
    from chiasm.plan.shapes import MODELS, of_folder

    folder = cached_folder(model)
    if folder is None:
        known = ", ".join(shape.name for shape in MODELS.values())
        raise ConfigurationError(
            f"The shape of {model!r} is not known, and it isn't in the cache of the Hugging Face hub. Give the folder of a "
            f"checkpoint, or one of {known}."
        )
    return of_folder(folder, model, bytes_per_value=2)


def _measured(config: PlanConfig, cpu: Device) -> tuple[ModelShape, Callable[[Place], CostModel]]:
    """Return the costs on this machine's cores: those of the file, which are measured first if there is none."""
    import torch

    from chiasm.engine.device import choose_dtype
    from chiasm.launch.config import model_name
    from chiasm.plan.costs import MeasuredCosts, check_writable, read_costs, write_costs
    from chiasm.plan.devices import Cpu
    from chiasm.plan.shapes import of_folder

    assert isinstance(cpu, Cpu)
    name = model_name(config.model)
    path = config.costs or _cache() / f"{name.replace('/', '--')}-{cpu.cores}.json"
    with _checkpoint(config.model) as folder:
        if config.calibrate or not within_reach(path).exists():
            from chiasm.plan.calibration import calibrate

            check_writable(path)
            write_costs(path, calibrate(folder, name, cpu.cores, note))
        dtype = choose_dtype("auto", folder, torch.device("cpu"))
        shape = of_folder(folder, config.model, bytes_per_value=dtype.itemsize)
    measured = read_costs(path, name)
    if measured.cores < cpu.cores:
        raise ConfigurationError(
            f"The costs in {path} were measured on {measured.cores} cores, and the plan is for {cpu.cores}; measure them again "
            "with --calibrate."
        )
    costs = MeasuredCosts(measured, shape.tokens_of)
    return shape, lambda place: costs


@contextmanager
def _checkpoint(model: str) -> Iterator[Path]:
    """The folder of a model; what ``chiasm bench goodput`` makes to measure with is made again."""
    from chiasm.bench.checkpoints import GOODPUT, GOODPUT_NAME, make_checkpoint
    from chiasm.models import resolve_folder

    if model != GOODPUT_NAME:
        yield resolve_folder(model)
        return
    with tempfile.TemporaryDirectory(prefix="chiasm-plan-") as parent:
        folder = Path(parent) / model
        make_checkpoint(folder, GOODPUT)
        yield folder


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "chiasm" / "plan"
