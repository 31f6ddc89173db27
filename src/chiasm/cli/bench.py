"""``chiasm bench``: what it costs and gains to separate the encoder, and prefill from decode, measured on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from chiasm.launch.config import EngineKind

_DIFFERENT = 1
_INTERRUPTED = 130


def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAMES]...",
            help=(
                "Measurements to run (default: all): identity, ttft, handoff, overlap, isolation, reuse, proxy, kv, split, "
                "decode-isolation, idle; with --engine vllm: identity, vllm-example, engines, reuse."
            ),
        ),
    ] = None,
    engine: Annotated[EngineKind, typer.Option(help="Engine of the instances.")] = EngineKind.CHIASM,
    model: Annotated[str, typer.Option(help="Folder of a checkpoint, name on the Hugging Face hub, or demo.")] = "demo",
    output: Annotated[Path, typer.Option(help="Folder for results.json and results.png.")] = Path("bench-results"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Take few samples, to see that everything runs rather than how fast.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of all requests and arrival times.")] = 0,
    repeat: Annotated[
        int | None,
        typer.Option(min=2, help="Number of samples of each measurement.", show_default="each measurement's own"),
    ] = None,
) -> None:
    """Benchmark E+PD and E+P+D against one aggregated instance.

    Exits with code 1 if answers differ; missed speed targets are only reported.
    """
    from chiasm.bench.run import BenchConfig, run

    try:
        same = run(BenchConfig(tuple(names or ()), engine, model, output, quick, seed, repeat))
    except KeyboardInterrupt:
        raise typer.Exit(_INTERRUPTED) from None
    if not same:
        raise typer.Exit(_DIFFERENT)
