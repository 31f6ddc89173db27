"""``chiasm models``."""

from __future__ import annotations

import os
import pty
import subprocess

from chiasm import checkpoints
from tests.cli.running import CHIASM, run


def test_names_and_folders_are_separated_by_a_tab() -> None:
    listed = [line.split("\t") for line in run("models").stdout.splitlines()]
    assert listed == [[name, str(checkpoints.folder(name))] for name in checkpoints.names()]


def test_a_terminal_shows_whole_folders_however_narrow_it_is() -> None:
    ours, theirs = pty.openpty()
    with open(ours, "rb", buffering=0) as terminal, os.fdopen(theirs, "w") as narrow:
        environment = {**os.environ, "COLUMNS": "30", "TERM": "xterm"}
        subprocess.run([*CHIASM, "models"], stdout=narrow, env=environment, check=True)
        shown = terminal.read(1 << 16).decode()
    folders = "".join(line.split("│")[-2].strip() for line in shown.splitlines() if "│" in line)
    assert folders == str(checkpoints.folder("demo"))
