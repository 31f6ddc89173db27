"""A process never outlives its parent, however that ended."""

from __future__ import annotations

import signal
import subprocess
import sys

import psutil

from tests.launch.waiting import alive, eventually

_WAIT = "print('up', flush=True); time.sleep(600)"
_IMPORTS = "import signal, time; from chiasm.launch import child"


def exit_code_after_stdin_closes(preparation: str) -> int:
    """Return how a process ends that runs ``preparation``, ends with its standard input, and would wait for long."""
    command = [sys.executable, "-c", f"{_IMPORTS}; {preparation}; child.end_with_stdin(); {_WAIT}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        process.stdout.readline()
        process.stdin.close()
        return process.wait(60)


def test_it_ends_when_its_standard_input_closes() -> None:
    assert exit_code_after_stdin_closes("pass") == -signal.SIGTERM


def test_it_ends_at_once_although_the_first_signal_only_asks_for_the_end() -> None:
    patient = "signal.signal(signal.SIGTERM, lambda *_: None); signal.signal(signal.SIGINT, signal.SIG_DFL)"
    assert exit_code_after_stdin_closes(patient) == -signal.SIGINT


def test_it_ends_even_if_it_ignores_signals() -> None:
    ignored = "".join(f"signal.signal(signal.{name}, signal.SIG_IGN); " for name in ("SIGTERM", "SIGINT"))
    deaf = f"child.GRACE_SECONDS = 0.1; {ignored.removesuffix('; ')}"
    assert exit_code_after_stdin_closes(deaf) == 1


def test_children_end_when_their_parent_is_killed() -> None:
    child = f"{_IMPORTS}; child.end_with_stdin(); print('ready x', flush=True); time.sleep(600)"
    parent = (
        "import os, sys, time; from chiasm.launch.child import Child\n"
        "def changed(child): print(child.state, child.pid, flush=True)\n"
        f"child = Child('c', [sys.executable, '-c', {child!r}], dict(os.environ),"
        " on_change=changed, on_line=lambda *line: None)\n"
        "child.start(); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        pid = next(int(line.split()[1]) for line in process.stdout if line.startswith("ready"))
        orphan = psutil.Process(pid)
        process.kill()
        assert eventually(lambda: not alive([orphan]))
