"""The commands of the guides in ``docs/``, as a shell reads them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import NamedTuple

DOCS = Path(__file__).parents[2] / "docs"
MODEL = "demo"
_END = "\x1e"
_NOTE = r"""
note() { printf '%s\0' "${VLLM_NIXL_SIDE_CHANNEL_HOST-}" "${CHIASM_FLEET_KEY-}" "$@" >&3; printf '\036\0' >&3; }
chiasm() { note chiasm "$@"; }
vllm() { note vllm "$@"; }
"""
"""What stands for the commands: it notes the variables and the words that they get."""


class Command(NamedTuple):
    """One command, with the variables that matter to it."""

    name: str
    arguments: list[str]
    side_channel_host: str
    fleet_key: str


def commands_of(guide: str, *headings: str, folder: Path) -> list[Command]:
    """Return the commands of chiasm and vLLM in the first block of code below a heading, in order.

    ``headings`` lead to it from the outermost one. The block runs in ``folder``, where it may write, with ``MODEL`` replaced.
    """
    text = (DOCS / guide).read_text()
    for heading in headings:
        _, found, text = text.partition(f"\n{heading}\n")
        assert found, f"{guide} has no {heading!r}"
    block = text.split("```\n")[1].replace("MODEL", MODEL)
    noted = folder / "commands"
    script = f"exec 3>{noted.name}\n{_NOTE}\n{block}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("CHIASM_", "VLLM_"))}
    subprocess.run(["bash", "-euc", script], cwd=folder, env=environment, check=True, timeout=60)
    commands = noted.read_text().split(f"{_END}\0")[:-1]
    return [_command(words.split("\0")[:-1]) for words in commands]


def _command(words: list[str]) -> Command:
    host, key, name, *arguments = words
    return Command(name, arguments, host, key)
