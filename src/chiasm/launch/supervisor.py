"""Runs a server that isn't chiasm's as a child of a deployment: ``python -m chiasm.launch.supervisor``.

A child of a deployment says ``ready`` on its standard output, ends with its standard input, leaves nothing behind and says in
one line why it could not start. vLLM does none of these: it has processes of its own, which outlive it when it is killed. The
supervisor is their parent, whatever happens to vLLM, and does all four for it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import psutil

from chiasm.cores import lower_priority, lower_session_priority, pin_to
from chiasm.launch.child import AT_ONCE, CONFIGURATION_EXIT_CODE, describe_exit, end_with_stdin, print_ready
from chiasm.launch.folders import LockedFolder
from chiasm.launch.ports import is_healthy

END_SECONDS = 1.5
"""Time for the server to end by itself when it has to end at once."""
_SLACK_SECONDS = 5.0
"""Time for the server to end by itself after what ran in it."""
_TRACKER_SECONDS = 1.2
"""Time for what is left in shared memory to be removed."""
_KILLED_SECONDS = 0.4
_GRACE_SECONDS = 4.5
"""Time for all of that when the parent is gone."""
_PROBE_SECONDS = 0.25
_LOCK_SECONDS = 0.1
_LINES_KEPT = 1000
_LINE_BYTES = 8192
_FAILED = 1
_SCRATCH_PREFIX = "chiasm-run-"
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_ENDING = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
_AWAITED = {*_ENDING, signal.SIGCHLD}
_LONGEST = 600
# "(EngineCore pid=123) ERROR 11-24 02:21:42 [core.py:1510] " before what a process of vLLM's says.
_PREFIX = re.compile(r"^(?:\([\w ]+ pid=\d+\) )?(?:(?:ERROR|CRITICAL) [\d-]+ [\d:.]+ \[[^\]]*\] ?)?")
_USAGE = re.compile(r"^[\w.\- ]+: error: (?P<said>.+)")
_RAISED = re.compile(r"^(?P<kind>(?:\w+\.)*\w*(?:Error|Exception|Exit|Interrupt))(?:: (?P<said>.*))?$")
# One process of vLLM's reports that another has failed; that one has said why.
_SECOND_HAND = ("Engine core initialization failed", "Worker failed with error", "WorkerProc initialization failed")
_VALIDATION = re.compile(r"\d+ validation errors? for ")
_VALUE = re.compile(r"^\s+(?:Value error, )?(?P<said>.+?)(?: \[type=.*)?$")


class Supervisor:
    """Runs one command, from its start to the end of the last process that it started."""

    def __init__(self, command: Sequence[str], url: str, shutdown_timeout_seconds: float = 0.0) -> None:
        """``url`` is where the command will serve; GET /health there says when it does.

        Once it does, it has ``shutdown_timeout_seconds`` for what runs in it when it is asked to end.
        """
        self._command = list(command)
        self._url = url
        self._shutdown_timeout_seconds = shutdown_timeout_seconds
        self._lines: deque[str] = deque(maxlen=_LINES_KEPT)
        self._ready = threading.Event()
        self._over = threading.Event()

    def run(self, turn: Path | None = None) -> int:
        """Start the command, pass on its output until it ends or this process is asked to end, and return the exit code.

        Of the supervisors with the same ``turn``, a file, only one at a time has a command that is starting. Call it in the
        main thread of a process that has started no other threads.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, _AWAITED)
        _adopt_orphans()
        end_with_stdin(_GRACE_SECONDS)
        with _Turn(turn) as mine, LockedFolder(_SCRATCH_PREFIX) as scratch:
            while not mine.taken():
                if _await_signal(_LOCK_SECONDS) in _ENDING:
                    return 0
            return self._supervise(mine, scratch.path)

    def _supervise(self, turn: _Turn, scratch: Path) -> int:
        process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(scratch)},  # its sockets and files go with it, also when it is killed
            preexec_fn=_begin_as_child,  # noqa: PLW1509, it takes no lock
        )
        assert process.stdout is not None
        reading = threading.Thread(target=self._pass_on, args=(process.stdout,), name="chiasm-output", daemon=True)
        reading.start()
        threading.Thread(target=self._probe, args=(turn,), name="chiasm-probe", daemon=True).start()
        try:
            asked = self._wait(process)
            if asked and self._ready.is_set():
                self._drain(process)
        finally:
            self._over.set()
            _end_all(process)
            reading.join(_KILLED_SECONDS)
        return 0 if asked else self._tell_failure(process.returncode)

    def _wait(self, process: subprocess.Popen[bytes]) -> bool:
        """Wait until the command has ended or this process is asked to end; return whether it is asked to."""
        while process.poll() is None:
            if _await_signal() in _ENDING:
                return True
        return False

    def _drain(self, process: subprocess.Popen[bytes]) -> None:
        """Ask the command to end; return when it has, when its time is over, or when this process is asked to end again."""
        process.terminate()
        until = time.monotonic() + self._shutdown_timeout_seconds + _SLACK_SECONDS
        while process.poll() is None and (left := until - time.monotonic()) > 0:
            if _await_signal(left) in _ENDING:
                return

    def _tell_failure(self, code: int) -> int:
        reason = decisive_line(self._lines)
        if self._ready.is_set() or code < 0:
            _say(f"The server ended with {describe_exit(code)}" + (f": {reason}" if reason and code >= 0 else "."))
            return _FAILED
        _say(f"Error: {reason or f'The server ended with {describe_exit(code)} before it was ready.'}")
        return CONFIGURATION_EXIT_CODE

    def _probe(self, turn: _Turn) -> None:
        while not self._over.wait(_PROBE_SECONDS):
            if is_healthy(self._url):
                self._ready.set()
                turn.pass_on()
                print_ready(self._url)
                return

    def _pass_on(self, stream: BinaryIO) -> None:
        while line := stream.readline(_LINE_BYTES):
            self._lines.append(line.decode(errors="replace").rstrip())
            with contextlib.suppress(OSError):  # nobody reads on
                sys.stderr.buffer.write(line)
                sys.stderr.buffer.flush()


class _Turn:
    """A lock on a file; without a file, it is always free."""

    def __init__(self, path: Path | None) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600) if path is not None else -1

    def taken(self) -> bool:
        """Try to take it; return whether it is ours now."""
        if self._descriptor < 0:
            return True
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def pass_on(self) -> None:
        if self._descriptor >= 0:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def __enter__(self) -> _Turn:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


def _end_all(process: subprocess.Popen[bytes]) -> None:
    """End the command if it runs, and kill what it leaves.

    Python's resource trackers go last: they end by themselves after all others, and remove what these left in shared memory.
    """
    if process.poll() is None:
        for number in AT_ONCE:
            process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)
    _kill(one for one in _descendants() if not _is_tracker(one))
    process.wait()
    _, left = psutil.wait_procs(_descendants(), _TRACKER_SECONDS)
    _kill(left)
    psutil.wait_procs(_descendants(), _KILLED_SECONDS)


def _descendants() -> list[psutil.Process]:
    return [one for one in psutil.Process().children(recursive=True) if _runs(one)]


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _is_tracker(process: psutil.Process) -> bool:
    try:
        return any("multiprocessing.resource_tracker" in argument for argument in process.cmdline())
    except psutil.Error:
        return False


def _kill(processes: Iterator[psutil.Process] | list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()


def _await_signal(timeout_seconds: float | None = None) -> int | None:
    """Return the next signal for this process, which is blocked everywhere else; None after the timeout."""
    if timeout_seconds is None:
        return signal.sigwait(_AWAITED)
    info = signal.sigtimedwait(_AWAITED, timeout_seconds)
    return info.si_signo if info else None


def _adopt_orphans() -> None:
    """Become the parent of the processes that a dead child leaves behind, in place of the system's first process."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _begin_as_child() -> None:
    """Between fork and exec: have the kernel kill the command when the supervisor dies, and unblock its signals."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _AWAITED)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def decisive_line(lines: Sequence[str]) -> str | None:
    """Return the last error in a log that isn't a report of another process's error; None if there is no error."""
    said = [_PREFIX.sub("", line, count=1) for line in lines]
    found: str | None = None
    second_hand: str | None = None
    for number, line in enumerate(said):
        if usage := _USAGE.match(line):
            found = usage["said"]
        elif raised := _RAISED.match(line):
            text = (raised["said"] or "").strip()
            if _VALIDATION.match(text):
                text = _first_value(said[number + 1 :]) or text
            if text.startswith(_SECOND_HAND):
                second_hand = text
            else:
                found = text or raised["kind"].rpartition(".")[2]
    chosen = found or second_hand
    return chosen[:_LONGEST] if chosen else None


def _first_value(lines: Sequence[str]) -> str | None:
    """Return the reason that pydantic gives below its headline."""
    for line in lines[:2]:
        if match := _VALUE.match(line):
            return match["said"]
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m chiasm.launch.supervisor", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--url",
        required=True,
        help="base URL at which the command will serve; GET /health there tells when it is ready",
    )
    parser.add_argument("--cpus", default="", help="CPUs for the command, separated by commas")
    parser.add_argument("--nice", type=int, default=0, help="how far the command gives way to other processes")
    parser.add_argument(
        "--shutdown-timeout-seconds", type=float, default=0.0, help="time for what runs in it when it is asked to end"
    )
    parser.add_argument("--turn", type=Path, help="file; of the commands that name it, only one at a time starts")
    parser.add_argument("command", nargs="+", help="the command, after --")
    chosen = parser.parse_args(arguments)
    pin_to([int(cpu) for cpu in chosen.cpus.split(",") if cpu])
    lower_priority(chosen.nice)
    lower_session_priority(chosen.nice)
    return Supervisor(chosen.command, chosen.url, chosen.shutdown_timeout_seconds).run(chosen.turn)


if __name__ == "__main__":
    sys.exit(main())
