"""A run of the bench: the chosen measurements one after the other, then the results."""

from __future__ import annotations

import asyncio
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chiasm.bench.client import opened
from chiasm.bench.goodput_options import GoodputOptions
from chiasm.bench.measurement import Bench, Measurement, Outcome
from chiasm.bench.measurements import MEASUREMENTS
from chiasm.bench.measurements.goodput import TraceMeasurement
from chiasm.bench.report import machine, print_outcome, write_json
from chiasm.bench.soak_options import SoakOptions
from chiasm.bench.trace import read_trace
from chiasm.errors import ConfigurationError
from chiasm.extras import Extra, require
from chiasm.launch.config import EngineKind
from chiasm.launch.fork_server import ForkServer
from chiasm.launch.vllm import installed

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

_RESULTS = "results.json"
_WIDTH = 110
"""Width of tables that go into a file or a pipe."""
_ASKED_TO_END = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class BenchConfig:
    """What to measure, on what, and where to write it."""

    names: tuple[str, ...] = ()
    """Names of measurements; if empty, all of the engine run that don't have to be asked for by name."""
    engine: EngineKind = EngineKind.CHIASM
    model: str = "demo"
    output: Path = Path("bench-results")
    quick: bool = False
    seed: int = 0
    repeat: int | None = None
    goodput: GoodputOptions = field(default_factory=GoodputOptions)
    soak: SoakOptions = field(default_factory=SoakOptions)
    trace: Path | None = None
    """Measure the requests of this file instead."""


def run(config: BenchConfig) -> bool:
    """Measure, print, and write ``results.json`` and ``results.png``. Return False if answers differ that must be equal.

    The results are written after each measurement, and after each part of some, so they are kept if a later one fails. Raises
    ChiasmError, and KeyboardInterrupt after a signal, when everything that was started has ended.
    """
    from rich.console import Console

    chosen = choose(config)
    try:
        config.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"Cannot write results to {config.output}: {error}") from error
    outcomes: dict[str, Outcome] = {}
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    about = {"machine": machine(), "engine": config.engine, "model": config.model, "seed": config.seed}
    about |= {"quick": config.quick, "repeat": config.repeat, "began": time.strftime("%Y-%m-%dT%H:%M:%S%z")}

    def save() -> None:
        write_json(config.output / _RESULTS, outcomes, about)

    try:
        asyncio.run(_until_signal(_measure(config, chosen, outcomes, console, save)))
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    finally:
        if outcomes:
            _draw(config, outcomes, about, console)
    return not any(outcome.wrong for outcome in outcomes.values())


def choose(config: BenchConfig) -> list[Measurement]:
    """Return the measurements in the order in which they run. Raises ConfigurationError."""
    require(Extra.BENCH, "`chiasm bench`")
    if config.trace is not None:
        return [TraceMeasurement(config.engine, read_trace(config.trace))]
    found = MEASUREMENTS[config.engine]
    for name in config.names:
        if name not in found:
            engines = [f"--engine {engine}" for engine, others in MEASUREMENTS.items() if name in others]
            problem = f"{name} runs only with {engines[0]}" if engines else f"There is no measurement {name!r}"
            raise ConfigurationError(f"{problem}; with --engine {config.engine} there are {', '.join(found)}.")
    if config.engine is EngineKind.VLLM:
        installed()
    return [one for name, one in found.items() if (name in config.names if config.names else not one.only_by_name)]


async def _until_signal(work: Any) -> None:
    """Run ``work``, and cancel it at the first signal; later signals don't disturb the clean-up."""
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    asked = False

    def ask() -> None:
        nonlocal asked
        if not asked:
            asked = True
            task.cancel()

    for number in _ASKED_TO_END:
        loop.add_signal_handler(number, ask)
    try:
        await task
    finally:
        for number in _ASKED_TO_END:
            loop.remove_signal_handler(number)


async def _measure(
    config: BenchConfig,
    chosen: Sequence[Measurement],
    outcomes: dict[str, Outcome],
    console: Console,
    save: Callable[[], None],
) -> None:
    with tempfile.TemporaryDirectory(prefix="chiasm-bench-") as scratch:
        async with opened() as client:
            with _progress() as progress, closing(ForkServer()) as forks:
                for measurement in chosen:
                    task = progress.add_task(measurement.name, total=None, doing="")

                    def show(text: str, steps: int | None, task: TaskID = task) -> None:
                        progress.update(task, doing=text)
                        if steps is not None:
                            progress.reset(task, total=steps)

                    started = time.monotonic()

                    def keep(
                        outcome: Outcome, measurement: Measurement = measurement, started: float = started
                    ) -> None:
                        outcome.seconds = time.monotonic() - started
                        outcomes[measurement.name] = outcome
                        save()

                    bench = Bench(
                        config.model,
                        Path(scratch),
                        client,
                        config.seed,
                        config.quick,
                        config.repeat,
                        config.goodput,
                        config.soak,
                        forks,
                        keep=keep,
                        on_phase=show,
                        advance=partial(progress.advance, task),
                    )
                    try:
                        keep(await measurement.run(bench))
                    finally:
                        progress.remove_task(task)
                        if measurement.name in outcomes:
                            print_outcome(console, measurement, outcomes[measurement.name])


def _progress() -> Progress:
    """Return a progress bar on standard error, which is shown only if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[doing]}"),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
        transient=True,
    )


def _draw(config: BenchConfig, outcomes: dict[str, Outcome], about: dict[str, Any], console: Console) -> None:
    from chiasm.bench.plot import write_plot

    image = config.output / "results.png"
    where = about["machine"]
    engine = "" if config.engine is EngineKind.CHIASM else f" over {config.engine}"
    models = ", ".join(dict.fromkeys(outcome.parameters.get("model", config.model) for outcome in outcomes.values()))
    title = f"chiasm bench{engine}: {models} on {where['cores']} cores of {where['cpu']}, {about['began'][:10]}"
    write_plot(image, outcomes, title)
    console.print(f"{config.output / _RESULTS}\n{image}", highlight=False, soft_wrap=True)
