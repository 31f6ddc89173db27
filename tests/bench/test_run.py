"""The command, with real processes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil

_BENCH = (sys.executable, "-m", "chiasm", "bench")


def test_identity_on_a_small_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    command = [*_BENCH, "identity", "--repeat", "6", "--model", str(checkpoint), "--output", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "differ: E+PD and generate" in ended.stdout
    found = json.loads((tmp_path / "results.json").read_text())["measurements"]["identity"]
    assert found["met"] is True
    assert len(found["figures"]) == 3
    assert (tmp_path / "results.png").is_file()


def test_an_unknown_measurement_is_refused_at_once(tmp_path: Path) -> None:
    command = [*_BENCH, "speed", "--output", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("Error: there is no measurement 'speed'")


def test_a_signal_ends_everything(checkpoint: Path, tmp_path: Path) -> None:
    command = [*_BENCH, "identity", "--model", str(checkpoint), "--output", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not (children := psutil.Process(process.pid).children()):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    _, alive = psutil.wait_procs(children, 1)
    assert not alive
    assert not list(tmp_path.iterdir())
