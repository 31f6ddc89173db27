"""The commands together, and how they end."""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn

import typer

from chiasm import __version__
from chiasm.cli.bench import bench
from chiasm.cli.demo import demo
from chiasm.cli.doctor import doctor
from chiasm.cli.groups import grouped
from chiasm.cli.instance import instance
from chiasm.cli.models import models
from chiasm.cli.proxy import proxy
from chiasm.cli.serve import serve
from chiasm.errors import ChiasmError

_EXIT_CODE = 2

app = typer.Typer(
    name="chiasm",
    help="Serve multimodal models with the vision encoder in processes of its own.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # rich's help takes longer to import than all else together
    pretty_exceptions_enable=False,
)
for _command in (serve, instance, proxy, demo, models, bench, doctor):
    app.command()(grouped(_command))


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"chiasm {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command that the arguments name. Expected faults end with one line on stderr and exit code 2."""
    try:
        app()
    except ChiasmError as error:
        _fail(error.message)
    except MemoryError:
        _fail("there is not enough memory; use a smaller model, or lower --kv-cache-bytes and --encoder-cache-bytes")


def _fail(message: str) -> NoReturn:
    print(f"Error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(_EXIT_CODE)
