"""``chiasm models``."""

from __future__ import annotations

from chiasm import checkpoints
from tests.cli.running import run


def test_names_and_folders_are_separated_by_a_tab() -> None:
    listed = [line.split("\t") for line in run("models").stdout.splitlines()]
    assert listed == [[name, str(checkpoints.folder(name))] for name in checkpoints.names()]
