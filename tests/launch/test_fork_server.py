"""Instances as forks of one process: whose children they are, what they inherit, and what is left when one is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from chiasm import checkpoints
from chiasm.launch.child import Process
from chiasm.launch.fork_server import ForkServer
from tests.fleet import FORKS, fork_servers
from tests.launch.waiting import alive, eventually

DEMO = checkpoints.folder("demo")
ENDED = (0, -signal.SIGTERM)
"""A process without configuration returns when its standard input closes, and asks itself to end."""
COMMAND = ("python", "-m", "chiasm", "child", "encoder-7")


def _start(**environment: str) -> Process:
    """Start what waits for its configuration."""
    return FORKS.start(DEMO, COMMAND, {**os.environ, **environment})


def _end(process: Process) -> int:
    """Close its standard input, as happens when its parent dies; return how it ends."""
    process.stdin.close()
    code = process.wait()
    process.stdout.close()
    process.stderr.close()
    return code


def test_a_fork_is_a_child_of_whoever_asked_for_it() -> None:
    process = _start()
    assert psutil.Process(process.pid).ppid() == os.getpid()
    assert _end(process) in ENDED


def test_a_fork_has_the_environment_and_the_command_line_that_were_asked_for() -> None:
    process = _start(LC_MINE="yes")
    assert " ".join(psutil.Process(process.pid).cmdline()).strip() == " ".join(COMMAND)
    process.stdin.write("not a configuration\n")
    process.stdin.flush()
    assert "JSON is malformed" in process.stderr.read()
    assert _end(process) == 1


def test_a_fork_leads_a_session_of_its_own() -> None:
    process = _start()
    assert os.getsid(process.pid) == process.pid
    _end(process)


def test_a_fork_has_imported_what_an_instance_needs() -> None:
    process = _start()
    assert "libtorch_cpu" in Path(f"/proc/{process.pid}/maps").read_text()
    _end(process)


def test_a_killed_fork_is_told_from_one_that_ends() -> None:
    process = _start()
    os.kill(process.pid, signal.SIGKILL)
    assert _end(process) == -signal.SIGKILL


def test_the_server_has_one_thread_since_a_fork_would_inherit_the_locks_of_others() -> None:
    _end(_start())
    assert {server.num_threads() for server in fork_servers()} == {1}


def test_a_fork_holds_no_pipe_of_another() -> None:
    first, second = _start(), _start()
    assert _end(first) in ENDED  # it would wait for ever if the second had the other end of its standard input
    assert _end(second) in ENDED


def test_asking_for_forks_changes_who_adopts_orphans_only_meanwhile() -> None:
    _end(_start())
    leaves_one = "import subprocess; print(subprocess.Popen(['sleep', '60'], stdout=2).pid)"
    left = int(subprocess.run([sys.executable, "-c", leaves_one], stdout=subprocess.PIPE, check=True).stdout)
    try:
        assert psutil.Process(left).ppid() != os.getpid()
    finally:
        os.kill(left, signal.SIGKILL)


def test_a_server_that_was_killed_fails_one_start_and_is_replaced_and_what_it_has_forked_runs_on() -> None:
    before = _start()
    for server in fork_servers():
        server.kill()
        server.wait()
    with pytest.raises(OSError, match="has ended"):
        _start()
    assert _end(_start()) in ENDED
    assert psutil.Process(before.pid).is_running()
    assert _end(before) in ENDED


def test_a_server_that_was_ended_starts_nothing() -> None:
    forks = ForkServer()
    forks.close()
    with pytest.raises(OSError, match="has ended"):
        forks.start(DEMO, COMMAND, {})


def test_the_server_ends_with_whoever_uses_it() -> None:
    code = (
        "import os, sys\n"
        "from chiasm import checkpoints\n"
        "from chiasm.launch.fork_server import ForkServer\n"
        f"process = ForkServer().start(checkpoints.folder('demo'), {COMMAND!r}, dict(os.environ))\n"
        "print(process.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline()
        family = psutil.Process(owner.pid).children()
        assert len(family) == 2
        owner.kill()
    assert eventually(lambda: not alive(family))
