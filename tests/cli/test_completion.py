"""What a shell completes after ``chiasm``."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from chiasm.cli.app import COMMANDS
from tests.cli.running import run


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    done = run("completion", "bash")
    assert done.returncode == 0, done.stderr
    file = tmp_path_factory.mktemp("completion") / "chiasm.bash"
    file.write_text(done.stdout)
    return file


def completed(script: Path, *words: str) -> Sequence[str]:
    """What bash offers for the last of ``words``, after ``chiasm``."""
    line = " ".join(f"'{word}'" for word in ("chiasm", *words))
    program = f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words)}; _shtab_chiasm; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_commands_are_completed(script: Path) -> None:
    assert set(COMMANDS) <= set(completed(script, ""))
    assert completed(script, "se") == ["serve"]


def test_options_of_a_command_are_completed(script: Path) -> None:
    assert completed(script, "serve", "--shut") == ["--shutdown-timeout-seconds"]


def test_values_of_an_option_are_completed(script: Path) -> None:
    assert completed(script, "serve", "--layout", "co") == ["colocated"]


def test_zsh_gets_a_script_of_its_own() -> None:
    done = run("completion", "zsh")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("#compdef chiasm")
    assert "--shutdown-timeout-seconds" in done.stdout
