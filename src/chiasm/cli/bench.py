"""``chiasm bench``: what it costs and gains to separate the encoder, and prefill from decode, measured on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from chiasm.bench.goodput_options import STANDARD, GoodputOptions
from chiasm.bench.soak_options import SoakOptions
from chiasm.cli import serve
from chiasm.cli.instance import MODEL_HELP
from chiasm.cli.parser import Parser, option, parse_arguments
from chiasm.errors import ConfigurationError
from chiasm.launch.config import DeploymentConfig, EngineKind
from chiasm.options import Option, fields_from

NAMES = (
    "Measurements to run (default: all but store, soak, churn and goodput): identity, ttft, handoff, arrivals, overlap, "
    "isolation, reuse, proxy, routing, scaling, kv, split, decode-isolation, step, idle, vocabulary, store, soak, churn, "
    "goodput; with --engine vllm: identity, vllm-example, engines, reuse, goodput."
)
ARM_EXAMPLE = '"mine=--encoders 2 --pds 2 --threads 1"'
ARM_HELP = (
    f"Another deployment to compare, by the options of `chiasm serve`, for example {ARM_EXAMPLE}; may be repeated."
)
_DIFFERENT = 1


@dataclass(frozen=True)
class BenchOptions:
    """The options of the command."""

    engine: Annotated[EngineKind, Option("Engine of the instances that are measured.")] = EngineKind.CHIASM
    model: Annotated[str, Option(MODEL_HELP, metavar="MODEL")] = "demo"
    output: Annotated[Path, Option("Folder for results.json and results.png.")] = Path("bench-results")
    quick: Annotated[bool, Option("Take few samples, to try the benchmark rather than to measure.")] = False
    seed: Annotated[int, Option("Seed of all requests and arrival times.", min=0)] = 0
    repeat: Annotated[int | None, Option("Samples of each measurement.", min=2, unset="its own number")] = None


def parser() -> Parser:
    made = Parser(
        "bench",
        "[NAMES]... [OPTIONS]\n       chiasm bench trace FILE [OPTIONS]",
        "Benchmark E+PD and E+P+D against one aggregated instance.\n\n"
        "`chiasm bench trace FILE` is goodput with the arrivals and sizes of a file of\nJSON lines.\n"
        "The exit code is 1 if answers differ; a missed speed target is only\nreported.",
    )
    made.add_argument("names", metavar="NAMES", nargs="*", help=NAMES)
    made.add("benchmark", BenchOptions)
    of_goodput = made.add_argument_group("goodput and trace")
    made.add(of_goodput, GoodputOptions)
    made.add_option(option("arm", tuple[str, ...], ARM_HELP, metavar='"NAME=FLAGS"'), of_goodput)
    made.add(made.add_argument_group("soak"), SoakOptions)
    return made


def run(settings: Mapping[str, Any]) -> int | None:
    from chiasm.bench.run import BenchConfig
    from chiasm.bench.run import run as run_bench

    goodput = GoodputOptions(
        **fields_from(settings, GoodputOptions), model=settings.get("model"), more_arms=_more_arms(settings)
    )
    names, trace = _trace(settings.get("names", ()))
    soak = SoakOptions(**fields_from(settings, SoakOptions))
    config = BenchConfig(names, **fields_from(settings, BenchOptions), goodput=goodput, soak=soak, trace=trace)
    return None if run_bench(config) else _DIFFERENT


def _trace(names: tuple[str, ...]) -> tuple[tuple[str, ...], Path | None]:
    """Return the measurements, or the file of ``trace FILE``. Raises ConfigurationError."""
    if "trace" not in names:
        return names, None
    if names[0] != "trace" or len(names) != 2:
        raise ConfigurationError("`chiasm bench trace` takes one file, and runs alone: chiasm bench trace FILE.")
    return (), Path(names[1])


def _more_arms(settings: Mapping[str, Any]) -> dict[str, DeploymentConfig]:
    """Return the deployments of ``--arm``. Raises ConfigurationError."""
    engine = settings.get("engine", EngineKind.CHIASM)
    found: dict[str, DeploymentConfig] = {}
    for text in settings.get("arm", ()):
        name, _, flags = text.partition("=")
        name = name.strip()
        if not flags or not name or "," in name:
            raise ConfigurationError(f"--arm: {text!r} is no arm; write for example {ARM_EXAMPLE}.")
        if name in STANDARD or name in found:
            raise ConfigurationError(f"--arm: there is an arm {name} already; choose another name.")
        arguments = ["bench", "--engine", engine, *parse_arguments(flags)]
        try:
            found[name] = serve.deployment_config(serve.parser().parse(arguments, environment={}))
        except ConfigurationError as error:
            raise ConfigurationError(f"--arm {name}: {error.message}") from None
    return found
