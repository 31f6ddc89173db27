"""One child process: started, restarted, ended."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from chiasm.launch.child import Child, ProcessState
from tests.launch.waiting import alive, eventually

Start = Callable[..., Child]
PR_SET_CHILD_SUBREAPER = 36
SERVES = "import time; print('ready http://127.0.0.1:1', flush=True); time.sleep(600)"


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a child that runs Python code."""
    children = []

    def started(code: str, configuration: str = "") -> Child:
        child = Child(
            "thing",
            [sys.executable, "-c", code],
            dict(os.environ),
            configuration=configuration,
            on_change=lambda child: None,
            on_line=lambda name, line: None,
        )
        children.append(child)
        child.start()
        return child

    yield started
    for child in children:
        child.kill()
        assert child.join(60)


def test_the_ready_line_makes_it_ready(start: Start) -> None:
    child = start(f"print('hello', flush=True); {SERVES}")
    assert eventually(lambda: child.state is ProcessState.READY)
    assert child.pid is not None


def test_a_process_that_dies_is_started_again_after_pauses_that_double(start: Start) -> None:
    child = start("import sys; print('ready x', flush=True); sys.exit(3)")
    assert eventually(lambda: child.restarts >= 2)
    notes = [line for line in list(child.lines) if "starting it again" in line]
    assert notes[:2] == [
        "ended with exit code 3; starting it again in 0.25 s",
        "ended with exit code 3; starting it again in 0.5 s",
    ]
    assert child.failure is None


def test_exit_code_2_at_the_start_is_final_and_its_error_is_kept(start: Start) -> None:
    child = start("import sys; print('noise\\nError: no such model', file=sys.stderr); sys.exit(2)")
    assert eventually(lambda: child.state is ProcessState.FAILED)
    assert child.failure is not None
    assert child.failure.message == "no such model"
    assert child.restarts == 0


def test_crashes_before_it_was_ever_ready_end_after_three_attempts(start: Start) -> None:
    child = start("import sys; print('out of luck', file=sys.stderr); sys.exit(1)")
    assert eventually(lambda: child.state is ProcessState.FAILED)
    assert child.failure is not None
    assert child.failure.message == "thing ended 3 times before it was ready, with exit code 1: out of luck"


def test_no_exit_code_is_final_once_it_was_ready(start: Start, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    child = start(
        f"import pathlib, sys; mark = pathlib.Path({str(mark)!r})\n"
        "if mark.exists(): sys.exit(2)\n"
        "mark.touch(); print('ready x', flush=True)"
    )
    assert eventually(lambda: child.restarts >= 2)
    assert child.failure is None


def test_a_command_that_cannot_be_executed_fails() -> None:
    child = Child("thing", ["/nowhere/python"], {}, on_change=lambda child: None, on_line=lambda name, line: None)
    child.start()
    assert child.join(30)
    assert child.state is ProcessState.FAILED
    assert child.failure is not None
    assert "with no process: cannot be started: " in child.failure.message
    assert "/nowhere/python" in child.failure.message


def test_each_start_gets_the_configuration_on_standard_input(start: Start, tmp_path: Path) -> None:
    told = tmp_path / "told"
    code = f"import sys; open({str(told)!r}, 'a').write(sys.stdin.readline()); print('ready x', flush=True)"
    child = start(code, configuration='{"a": 1}')
    assert eventually(lambda: child.restarts >= 1 and told.read_text().startswith('{"a": 1}\n{"a": 1}\n'))


def test_it_ends_when_asked_and_is_not_started_again(start: Start) -> None:
    child = start(SERVES)
    assert eventually(lambda: child.state is ProcessState.READY)
    child.end()
    assert child.join(60)
    assert child.state is ProcessState.STOPPED
    assert child.pid is None


def test_it_ends_when_asked_while_it_waits_for_a_restart(start: Start) -> None:
    child = start("print('ready x', flush=True)")
    assert eventually(lambda: child.state is ProcessState.WAITING)
    child.end()
    assert child.join(60)
    assert child.state is ProcessState.STOPPED


def test_kill_ends_a_process_that_ignores_signals_and_its_children(start: Start) -> None:
    child = start(
        "import signal, subprocess, sys\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "other = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print('ready x', flush=True); other.wait()"
    )
    assert eventually(lambda: child.state is ProcessState.READY)
    processes = [psutil.Process(child.pid), *psutil.Process(child.pid).children()]
    child.end()
    assert not child.join(0.2)
    child.kill()
    assert child.join(60)
    assert eventually(lambda: not alive(processes))


@pytest.mark.parametrize("stdout", ["subprocess.DEVNULL", "sys.stdout"])
def test_children_of_a_killed_process_are_killed(start: Start, stdout: str) -> None:
    child = start(
        "import subprocess, sys\n"
        f"other = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], stdout={stdout})\n"
        "print('ready x', flush=True); other.wait()"
    )
    assert eventually(lambda: child.state is ProcessState.READY)
    process = psutil.Process(child.pid)
    left = process.children()
    assert len(left) == 1
    process.kill()
    assert eventually(lambda: not alive(left))
    assert eventually(lambda: child.restarts >= 1 and child.state is ProcessState.READY)


@pytest.fixture
def adopting() -> Iterator[None]:
    """Whoever loses its parent below this process becomes its child, as that of the first process of a container."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    yield
    libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process adopt others")
@pytest.mark.usefixtures("adopting")
def test_the_first_process_of_a_container_keeps_no_zombies_of_a_killed_process(start: Start) -> None:
    child = start(
        "import subprocess, sys\n"
        "other = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print('ready x', flush=True); other.wait()"
    )
    assert eventually(lambda: child.state is ProcessState.READY)
    process = psutil.Process(child.pid)
    (left,) = process.children()
    process.kill()
    assert eventually(lambda: child.restarts >= 1 and child.state is ProcessState.READY)
    assert not psutil.pid_exists(left.pid)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of threads for which there is no room, each once."""
    begin, refused = threading.Thread.start, list[str]()

    def begin_unless_refused(thread: threading.Thread) -> None:
        if thread.name in refused:
            refused.remove(thread.name)
            raise RuntimeError("can't start new thread")
        begin(thread)

    monkeypatch.setattr(threading.Thread, "start", begin_unless_refused)
    return refused


def test_a_process_for_which_there_is_no_thread_cannot_be_started(start: Start, refused: list[str]) -> None:
    refused.append("chiasm-thing")
    child = start(SERVES)
    assert child.join(0.0)
    assert child.state is ProcessState.FAILED
    assert child.failure is not None
    assert child.failure.message == "thing cannot be started: can't start new thread."


@pytest.mark.parametrize("reader", ["ready", "log"])
def test_a_process_that_no_thread_can_follow_is_started_again(start: Start, refused: list[str], reader: str) -> None:
    refused.append(f"chiasm-thing-{reader}")
    child = start(SERVES)
    assert eventually(lambda: child.state is ProcessState.READY)
    assert child.restarts == 1
    assert "cannot be followed: can't start new thread" in child.lines


def test_a_process_dies_also_where_another_one_keeps_its_streams(start: Start) -> None:
    child = start(
        "import subprocess, sys\n"
        "other = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
        "print('ready x', flush=True); other.wait()"
    )
    assert eventually(lambda: child.state is ProcessState.READY)
    process = psutil.Process(child.pid)
    (left,) = process.children()
    process.kill()
    try:
        assert eventually(lambda: child.restarts >= 1 and child.state is ProcessState.READY)
    finally:
        left.kill()
        for other in psutil.Process(child.pid).children():
            other.kill()


def test_its_log_is_bounded_in_lines_and_line_length(start: Start) -> None:
    child = start(f"import sys; print('x' * 100_000, *range(300), sep='\\n', file=sys.stderr, flush=True); {SERVES}")
    assert eventually(lambda: child.lines and child.lines[-1] == "299")
    assert len(child.lines) == 200
    assert max(map(len, child.lines)) <= 8192
