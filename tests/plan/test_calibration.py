"""The processes that keep other cores busy while costs are measured."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from tests.cli.running import default_signals

_MEASURING = """
import multiprocessing, sys
from chiasm import checkpoints
from chiasm.plan.calibration import _neighbours

try:
    with _neighbours(checkpoints.folder("demo"), 1):
        print(multiprocessing.active_children()[0].pid, flush=True)
        sys.stdin.read()
except KeyboardInterrupt:
    print("interrupted")
"""


@contextmanager
def measuring() -> Iterator[tuple[subprocess.Popen[str], psutil.Process]]:
    """A process of a terminal, and its neighbour, which computes."""
    command = [sys.executable, "-c", _MEASURING]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command,
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
        start_new_session=True,
        preexec_fn=default_signals,  # noqa: PLW1509 - it only sets signals
    ) as parent:
        assert parent.stdout is not None
        neighbour = psutil.Process(int(parent.stdout.readline()))
        try:
            yield parent, neighbour
        finally:
            for one in (parent, neighbour):
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()


def test_a_neighbour_does_not_outlive_who_measures() -> None:
    with measuring() as (parent, neighbour):
        parent.kill()
        neighbour.wait(60)


def test_ctrl_c_ends_a_neighbour_without_a_word() -> None:
    with measuring() as (parent, neighbour):
        os.killpg(parent.pid, signal.SIGINT)
        assert parent.communicate(timeout=60) == ("interrupted\n", "")
        assert not neighbour.is_running()
