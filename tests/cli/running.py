"""The command line as processes."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

import psutil

from tests.launch.waiting import alive, eventually

CHIASM = (sys.executable, "-m", "chiasm")


def run(*arguments: str, timeout_seconds: float = 280) -> subprocess.CompletedProcess[str]:
    """Run a command that ends by itself."""
    return subprocess.run(
        [*CHIASM, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
        check=False,
    )


class Running:
    """A command that runs until it is told to end; leaving the context kills it and its children."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self._out = folder / "stdout"
        self._err = folder / "stderr"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = psutil.Popen(
                [*CHIASM, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                preexec_fn=default_signals,
            )

    def __enter__(self) -> Running:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        family = [*self.children, self.process]
        for process in alive(family):
            with contextlib.suppress(psutil.NoSuchProcess):  # it ends with its parent
                process.kill()
        self.process.wait(60)

    @property
    def stdout(self) -> str:
        return self._out.read_text()

    @property
    def stderr(self) -> str:
        return self._err.read_text()

    @property
    def children(self) -> list[psutil.Process]:
        """Processes that it has started and that still run."""
        try:
            return alive(self.process.children(recursive=True))
        except psutil.NoSuchProcess:
            return []

    def wait_ready(self, timeout_seconds: float = 240) -> str:
        """The URL of the ready line."""
        assert eventually(lambda: self.stdout or self.process.poll() is not None, timeout_seconds), self.stderr
        assert self.stdout.startswith("ready "), self.stderr
        return self.stdout.removeprefix("ready ").strip()

    def end(self, number: signal.Signals) -> float:
        """Send a signal and wait for the end; returns the seconds that it took."""
        started = time.monotonic()
        self.process.send_signal(number)
        self.process.wait(60)
        return time.monotonic() - started


def default_signals() -> None:
    """Between fork and exec: a shell starts its background jobs with SIGINT ignored, and pytest may be one of them."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
