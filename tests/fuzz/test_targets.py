"""Each target of the fuzzer, for seconds: ``CHIASM_FUZZ_SECONDS`` (10), in a process of its own."""

from __future__ import annotations

import importlib
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

TARGETS = Path(__file__).parent / "targets"
SECONDS = int(os.environ.get("CHIASM_FUZZ_SECONDS", "10"))
HAS_ATHERIS = sys.platform == "linux" and platform.machine() == "x86_64" and sys.version_info < (3, 14)
"""Where the extra ``dev`` installs it."""


@pytest.mark.skipif(not HAS_ATHERIS, reason="atheris has wheels for Linux on x86-64 up to Python 3.13 only")
@pytest.mark.timeout(SECONDS + 240)
@pytest.mark.parametrize("target", ["image_header", "entry_file", "channel"])
def test_whatever_bytes_come_they_are_taken_or_refused_by_name(target: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.fuzz", target, "--seconds", str(SECONDS), "--corpus", str(tmp_path)]
    ended = subprocess.run(command, cwd=TARGETS.parents[2], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-5000:]
    assert "Done " in ended.stderr  # it ran to its end


@pytest.mark.parametrize("target", sorted(one.stem for one in TARGETS.glob("[a-z]*.py")))
def test_the_inputs_that_a_target_begins_with_are_understood(target: str) -> None:
    module = importlib.import_module(f"tests.fuzz.targets.{target}")
    for data in module.seeds():
        assert module.take(data), data[:100]
