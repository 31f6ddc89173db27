"""``chiasm models``: the checkpoints that come with the package."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from chiasm.cli.parser import Parser


def parser() -> Parser:
    return Parser("models", "[OPTIONS]", "List the checkpoints that come with chiasm: names and folders.")


def run(settings: Mapping[str, Any]) -> None:
    from chiasm import checkpoints

    folders = {name: checkpoints.folder(name) for name in checkpoints.names()}
    if not sys.stdout.isatty():
        for name, folder in folders.items():
            print(f"{name}\t{folder}")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("name")
    table.add_column("folder", overflow="fold")
    for name, folder in folders.items():
        table.add_row(name, Text(str(folder)))
    Console().print(table)
