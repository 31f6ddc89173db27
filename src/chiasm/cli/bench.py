"""``chiasm bench``: what it costs and gains to separate the encoder, and prefill from decode, measured on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from chiasm.cli.instance import MODEL_HELP
from chiasm.cli.parser import Parser
from chiasm.launch.config import EngineKind
from chiasm.options import Option, fields_from

NAMES = (
    "Measurements to run (default: all): identity, ttft, handoff, overlap, isolation, reuse, proxy, kv, split, "
    "decode-isolation, idle; with --engine vllm: identity, vllm-example, engines, reuse."
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
        "[NAMES]... [OPTIONS]",
        "Benchmark E+PD and E+P+D against one aggregated instance.\n\n"
        "The exit code is 1 if answers differ; a speed target that is missed is only reported.",
    )
    made.add_argument("names", metavar="NAMES", nargs="*", help=NAMES)
    made.add("benchmark", BenchOptions)
    return made


def run(settings: Mapping[str, Any]) -> int | None:
    from chiasm.bench.run import BenchConfig
    from chiasm.bench.run import run as run_bench

    same = run_bench(BenchConfig(settings.get("names", ()), **fields_from(settings, BenchOptions)))
    return None if same else _DIFFERENT
