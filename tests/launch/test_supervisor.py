"""A server that isn't chiasm's, under its supervisor."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from chiasm.launch.ports import HeldPort
from tests.launch.waiting import alive, command_line, eventually

SHARED_MEMORY = Path("/dev/shm")
SERVER = """
import http.server, multiprocessing, os, signal, sys, time
from multiprocessing import shared_memory

def work():
    {worker}
    time.sleep(600)

class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
    def log_message(self, *said):
        pass

if __name__ == "__main__":
    {before}
    block = shared_memory.SharedMemory(create=True, size=4096)
    print("block", block.name, flush=True)
    print("folder", os.environ["TMPDIR"], flush=True)
    multiprocessing.get_context("spawn").Process(target=work).start()
    http.server.ThreadingHTTPServer(("127.0.0.1", {port}), Health).serve_forever()
"""

PATIENT = """
import sys
from chiasm.launch import supervisor

for name in ("_TRACKER_SECONDS", "_KILLED_SECONDS", "_GRACE_SECONDS"):
    setattr(supervisor, name, 60.0)
sys.exit(supervisor.main())
"""
"""A supervisor that gives what it ends the time to go that it may take on a busy machine."""


class Supervised:
    """A supervisor, with the server's code in a file; leaving it kills what is left."""

    def __init__(
        self,
        folder: Path,
        before: str = "pass",
        worker: str = "pass",
        turn: Path | None = None,
        nice: int = 0,
        seconds: float = 0.0,
    ) -> None:
        self._held = HeldPort("127.0.0.1")
        port, self.url = self._held.port, self._held.url
        file = folder / f"server-{port}.py"
        file.write_text(SERVER.format(before=textwrap.indent(before, "    ").lstrip(), worker=worker, port=port))
        self._errors = folder / f"stderr-{port}"
        command = [sys.executable, "-c", PATIENT, "--url", self.url]
        command += ["--shutdown-timeout-seconds", str(seconds)]
        command += ["--turn", str(turn)] if turn else []
        command += ["--nice", str(nice)] if nice else []
        with self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [*command, "--", sys.executable, str(file)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "TMPDIR": str(folder)},
                start_new_session=True,
            )

    @property
    def family(self) -> list[psutil.Process]:
        """What it has started: the server, its worker, and the tracker of what those share."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return alive(psutil.Process(self.process.pid).children(recursive=True))
        return []

    @property
    def said(self) -> str:
        return self._errors.read_text()

    def wait_ready(self) -> list[psutil.Process]:
        """Returns the family."""
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == f"ready {self.url}\n", self.said
        assert eventually(lambda: len(self.family) == 3)
        return self.family

    def left(self, family: list[psutil.Process]) -> list[object]:
        """Processes, blocks of shared memory and folders that are still there."""
        words = dict(
            line.split(maxsplit=1) for line in self.said.splitlines() if line.startswith(("block ", "folder "))
        )
        paths = [SHARED_MEMORY / words["block"], Path(words["folder"])]
        return [*alive(family), *(path for path in paths if path.exists())]

    def close(self) -> None:
        for process in self.family:
            process.kill()
        self.process.kill()
        with self.process:
            pass
        self._held.release()


Start = Callable[..., Supervised]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a supervisor; see ``Supervised``."""
    with contextlib.ExitStack() as stack:

        def started(before: str = "pass", worker: str = "pass", **others: Any) -> Supervised:
            one = Supervised(tmp_path, before, worker, **others)
            stack.callback(one.close)
            return one

        yield started


def test_it_says_ready_when_the_server_answers_and_ends_everything_when_asked(start: Start) -> None:
    one = start()
    family = one.wait_ready()
    one.process.terminate()
    assert one.process.wait(60) == 0
    assert not one.left(family)


def test_a_server_that_serves_has_time_to_end_what_runs(start: Start, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    drain = (
        "def drain(*_):\n"
        "    print('asked', flush=True)\n"
        f"    while not os.path.exists({str(gate)!r}): time.sleep(0.02)\n"
        "    print('whole', flush=True)\n"
        "    os._exit(0)\n"
        "signal.signal(signal.SIGTERM, drain)"
    )
    one = start(drain, seconds=60)
    family = one.wait_ready()
    one.process.terminate()
    assert eventually(lambda: "asked" in one.said)
    gate.touch()
    assert one.process.wait(60) == 0
    assert "whole" in one.said
    assert not one.left(family)


def test_a_second_signal_ends_a_server_at_once(start: Start) -> None:
    one = start("signal.signal(signal.SIGTERM, lambda *_: print('asked', flush=True))", seconds=600)
    family = one.wait_ready()
    one.process.terminate()
    assert eventually(lambda: "asked" in one.said)
    one.process.terminate()
    assert one.process.wait(60) == 0
    assert not one.left(family)


def test_it_ends_with_its_standard_input(start: Start) -> None:
    one = start()
    family = one.wait_ready()
    assert one.process.stdin is not None
    one.process.stdin.close()
    assert one.process.wait(60) == 0
    assert not one.left(family)


def test_processes_that_ignore_signals_are_killed_and_leave_nothing(start: Start) -> None:
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.signal(signal.SIGINT, signal.SIG_IGN)"
    one = start(deaf, deaf)
    family = one.wait_ready()
    one.process.send_signal(signal.SIGTERM)
    one.process.send_signal(signal.SIGINT)
    assert one.process.wait(60) == 0
    assert not one.left(family)


def test_a_killed_server_leaves_nothing_and_may_be_started_again(start: Start) -> None:
    one = start()
    family = one.wait_ready()
    server = next(process for process in family if "server-" in " ".join(command_line(process)))
    server.kill()
    assert one.process.wait(60) == 1
    assert "The server ended with SIGKILL" in one.said
    assert not one.left(family)


def test_the_server_dies_with_a_killed_supervisor(start: Start) -> None:
    one = start()
    family = one.wait_ready()
    server = next(process for process in family if "server-" in " ".join(command_line(process)))
    one.process.kill()
    assert eventually(lambda: not alive([server]))
    for process in alive(family):
        process.kill()


def test_one_line_says_why_a_server_could_not_start(start: Start) -> None:
    one = start("raise ValueError('there is no such model')")
    assert one.process.wait(60) == 2
    assert one.said.splitlines()[-1] == "Error: there is no such model"


def test_one_line_says_that_a_server_ended_without_a_reason(start: Start) -> None:
    one = start("sys.exit(5)")
    assert one.process.wait(60) == 2
    assert one.said.splitlines()[-1] == "Error: The server ended with exit code 5 before it was ready."


def test_supervisors_with_the_same_turn_start_one_at_a_time(start: Start, tmp_path: Path) -> None:
    turn, gate = tmp_path / "turn", tmp_path / "gate"
    first = start(f"while not os.path.exists({str(gate)!r}): time.sleep(0.02)", turn=turn)
    assert eventually(lambda: first.family)
    second = start(turn=turn)
    third = start()
    third.wait_ready()  # it needs no turn, and is ready long after the second could have started
    assert not second.family
    gate.touch()
    first.wait_ready()
    second.wait_ready()


def test_a_supervisor_that_waits_for_its_turn_ends_when_asked(start: Start, tmp_path: Path) -> None:
    turn, gate = tmp_path / "turn", tmp_path / "gate"
    first = start(f"while not os.path.exists({str(gate)!r}): time.sleep(0.02)", turn=turn)
    assert eventually(lambda: first.family)
    second = start(turn=turn)
    second.process.send_signal(signal.SIGTERM)
    assert second.process.wait(60) in {0, -signal.SIGTERM}
    assert not second.family


def test_a_server_and_its_processes_give_way_as_far_as_asked(start: Start) -> None:
    one = start(nice=5)
    family = one.wait_ready()
    assert {process.nice() for process in family} == {os.nice(0) + 5}


@pytest.mark.skipif(not Path("/proc/self/autogroup").exists(), reason="the kernel weighs no sessions")
def test_the_session_of_a_server_gives_way_too(start: Start) -> None:
    one = start(nice=5)
    one.wait_ready()
    assert Path(f"/proc/{one.process.pid}/autogroup").read_text().split()[-1] == "5"
