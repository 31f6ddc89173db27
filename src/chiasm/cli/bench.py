"""``chiasm bench``: what separating the encoder costs and gains, measured on this machine."""

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
                "identity, ttft, handoff, overlap, isolation, reuse, proxy, kv, split, decode-isolation, idle; "
                "with --engine vllm: vllm-identity, vllm-example, engines, vllm-reuse; all of them if none is given."
            ),
        ),
    ] = None,
    engine: Annotated[
        EngineKind, typer.Option(help="What runs in the instances that are measured.")
    ] = EngineKind.CHIASM,
    model: Annotated[str, typer.Option(help="A checkpoint's folder, a hub name, or demo.")] = "demo",
    output: Annotated[Path, typer.Option(help="Folder for results.json and results.png.")] = Path("bench-results"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Few samples: shows that it runs, not how fast it is.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of all requests and arrival times.")] = 0,
    repeat: Annotated[
        int | None, typer.Option(min=2, help="Samples of each measurement.", show_default="its own number")
    ] = None,
) -> None:
    """Measure the encoder apart from prefill and decode, and these apart from each other, against all in one.

    Exits with 1 if answers differ; a target of speed that isn't met is only said.
    """
    from chiasm.bench.run import BenchConfig, run

    try:
        same = run(BenchConfig(tuple(names or ()), engine, model, output, quick, seed, repeat))
    except KeyboardInterrupt:
        raise typer.Exit(_INTERRUPTED) from None
    if not same:
        raise typer.Exit(_DIFFERENT)
