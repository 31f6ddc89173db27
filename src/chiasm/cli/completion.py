"""``chiasm completion``: what a shell completes after ``chiasm``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from chiasm.cli.app import COMMANDS
from chiasm.cli.parser import Parser, choices

_SHELLS = ("bash", "zsh")


def parser() -> Parser:
    made = Parser(
        "completion",
        "SHELL",
        "Print the completion script of SHELL (bash or zsh).\n\n"
        'For bash, put `eval "$(chiasm completion bash)"` into ~/.bashrc.',
    )
    made.add_argument("shell", metavar="SHELL", choices=_SHELLS, help="bash or zsh.")
    return made


def run(settings: Mapping[str, Any]) -> None:
    import shtab

    print(shtab.complete(_all_commands(), shell=settings["shell"]))


def _all_commands() -> argparse.ArgumentParser:
    """Return one parser of all commands, whose actions know what completes their values."""
    import shtab

    made = argparse.ArgumentParser("chiasm", description="Serve multimodal models.")
    made.add_argument("--version", action="store_true", help="Print the version and exit.")
    commands = made.add_subparsers(parser_class=cast("type[argparse.ArgumentParser]", _command))
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        assert isinstance(command, Parser)
        for action, named in command.options.items():
            action.choices = choices(named) or None
            if named.type is Path:
                action.complete = shtab.FILE  # type: ignore[attr-defined] # shtab's convention
    return made


def _command(*, prog: str, **ignored: object) -> Parser:
    """Return the parser of the command that ``prog`` ends with."""
    made: Parser = import_module(f"chiasm.cli.{prog.rsplit(maxsplit=1)[-1]}").parser()
    return made
