"""``chiasm models``: the checkpoints that come with the package."""

from __future__ import annotations

import sys


def models() -> None:
    """List the checkpoints that come with chiasm: names and folders."""
    from chiasm import checkpoints

    folders = {name: checkpoints.folder(name) for name in checkpoints.names()}
    if not sys.stdout.isatty():
        for name, folder in folders.items():
            print(f"{name}\t{folder}")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "folder")
    for name, folder in folders.items():
        table.add_row(name, str(folder))
    Console().print(table)
