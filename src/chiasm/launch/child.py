"""One process of a deployment: started, listened to, started again when it dies, ended.

The child's side of the contract: it takes its configuration from the first line of standard input, says ``ready URL`` on
standard output, ends with exit code 2 if starting it again would not help, ends by a signal when nothing runs in it anymore,
and ends at once by a second signal and when standard input closes.
"""

from __future__ import annotations

import contextlib
import enum
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO

from chiasm.errors import ConfigurationError

CONFIGURATION_EXIT_CODE = 2
"""Exit code of a command that would fail at every further start."""
START_ATTEMPTS = 3
"""Attempts to start a process that was never ready and ends with another exit code."""
FIRST_DELAY_SECONDS = 0.25
LONGEST_DELAY_SECONDS = 30.0
STEADY_SECONDS = 60.0
"""Time of being ready after which the back-off resets."""
GRACE_SECONDS = 3.0
"""Time for a child to end by itself when its standard input has closed."""
AT_ONCE = (signal.SIGTERM, signal.SIGINT)
"""The first lets what runs end, and a second one ends it. Two of one kind could arrive as one."""
_READY = "ready "
_STDIN = 0
_LAST_LINES_SECONDS = 1.0
"""Time to read what an ended process has logged; longer only where another process still has its streams."""
_REAP_SECONDS = 0.5
"""Time for killed processes to be gone."""
_PARTS = 10
_LINES_KEPT = 200
_LINE_CHARACTERS = 8192


class ProcessState(enum.StrEnum):
    """Where a process of a deployment is in its life."""

    STARTING = "starting"
    READY = "ready"
    """It has said so; only the proxy knows whether it is healthy."""
    WAITING = "waiting"
    """It died and will be started again."""
    FAILED = "failed"
    """It could not be started and will not be."""
    STOPPED = "stopped"


@dataclass(frozen=True)
class Process:
    """A process that was started, in a session of its own."""

    pid: int
    stdin: IO[str]
    stdout: IO[str]
    stderr: IO[str]
    wait: Callable[[], int]
    """Wait for its end, free its number, and return its return code as ``subprocess`` does."""


Start = Callable[[Sequence[str], Mapping[str, str]], Process]
"""Starts a command in an environment. Raises OSError."""


def start_process(command: Sequence[str], environment: Mapping[str, str], *, inherited: Sequence[int] = ()) -> Process:
    """Start a command in an environment, with these descriptors of this process. Raises OSError."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=environment,
        pass_fds=inherited,
        start_new_session=True,  # Ctrl-C in the terminal is for this process, which then ends its children
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    return Process(process.pid, process.stdin, process.stdout, process.stderr, process.wait)


class Child:
    """A command that runs until it is asked to end.

    One thread starts it and waits for it, again and again; others read its standard output and pass on its standard error.
    Its standard input is a pipe that closes when this process dies, however that happens: a child that ends with
    its standard input never outlives its parent. What a process started and did not end is killed when it has ended.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        configuration: str = "",
        start: Start = start_process,
        on_change: Callable[[Child], None],
        on_line: Callable[[str, str], None],
    ) -> None:
        """``configuration`` is one line for the process's standard input; empty: nothing is written there. ``start`` is called
        in a thread of this object.

        ``on_change`` is called at every new state, ``on_line`` with each line (name, text) of standard error. Both are called
        in threads of this object and must not block.
        """
        self.name = name
        self.command = tuple(command)
        self.state = ProcessState.STARTING
        self.pid: int | None = None
        self.restarts = 0
        self.failure: ConfigurationError | None = None
        """Why it could not be started; only in state FAILED."""
        self.lines: deque[str] = deque(maxlen=_LINES_KEPT)
        """The last lines of standard error, of all runs."""
        self._environment = environment
        self._configuration = configuration
        self._start = start
        self._on_change = on_change
        self._on_line = on_line
        self._lock = threading.Lock()  # guards the process, and whether one may be started
        self._process: Process | None = None
        self._ending = threading.Event()
        self._ever_ready = False
        self._ready_since: float | None = None
        self._thread = threading.Thread(target=self._live, name=f"chiasm-{name}", daemon=True)

    def start(self) -> None:
        """Start the command, now and whenever it dies."""
        try:
            self._thread.start()
        except RuntimeError as error:  # the system has no thread for it
            self.failure = ConfigurationError(f"{self.name} cannot be started: {error}.")
            self._change(ProcessState.FAILED)

    def end(self, *, at_once: bool = False) -> None:
        """Ask the process to end when nothing runs in it, or ``at_once``; it is not started again. Returns at once."""
        self._ending.set()
        for number in AT_ONCE if at_once else AT_ONCE[:1]:
            self._signal(number)

    @property
    def is_ending(self) -> bool:
        """Whether it was asked to end."""
        return self._ending.is_set()

    def kill(self) -> None:
        """Kill the process and all that it has started; it is not started again."""
        self._ending.set()
        self._signal(signal.SIGKILL)

    def join(self, timeout_seconds: float) -> bool:
        """Wait for the end; return whether it came."""
        if self._thread.ident is not None:
            self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def _signal(self, number: signal.Signals) -> None:
        with self._lock:
            if self._process is None:
                return
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if number is signal.SIGKILL:
                    os.killpg(self._process.pid, number)
                else:
                    os.kill(self._process.pid, number)

    # ---- in its thread ------------------------------------------------------------------------------------------------

    def _live(self) -> None:
        failures = 0
        while True:
            self._ready_since = None
            code: int | None = None
            self._change(ProcessState.STARTING)
            process = self._spawn()
            if process is not None:
                code = self._follow(process)
            if self._ending.is_set():
                self._change(ProcessState.STOPPED)
                return
            was_steady = self._ready_since is not None and time.monotonic() - self._ready_since > STEADY_SECONDS
            failures = 1 if was_steady else failures + 1
            if self._gives_up(code, failures):
                return
            delay = min(FIRST_DELAY_SECONDS * 2 ** min(failures - 1, 16), LONGEST_DELAY_SECONDS)
            self._note(f"ended with {describe_exit(code)}; starting it again in {delay:g} s")
            self._change(ProcessState.WAITING)
            if self._ending.wait(delay):
                self._change(ProcessState.STOPPED)
                return
            self.restarts += 1

    def _spawn(self) -> Process | None:
        if self._ending.is_set():
            return None
        try:
            process = self._start(self.command, self._environment)  # without the lock, since it may take seconds
        except OSError as error:
            if not self._ending.is_set():
                self._note(f"cannot be started: {error}")
            return None
        with self._lock:
            self._process = process
            self.pid = process.pid
        if self._ending.is_set():  # nobody could ask it
            self._signal(signal.SIGKILL)
        return process

    def _follow(self, process: Process) -> int:
        """Wait until the process has ended, and return its return code.

        What it says is read in threads: a process that it has started may keep its streams open after its end, and then reading
        doesn't end.
        """
        self._configure(process)
        readers = [
            threading.Thread(target=read, args=(stream,), name=f"chiasm-{self.name}-{name}", daemon=True)
            for name, read, stream in (
                ("ready", self._await_ready, process.stdout),
                ("log", self._pass_on, process.stderr),
            )
        ]
        reading = []
        try:
            for reader in readers:
                reader.start()
                reading.append(reader)
        except RuntimeError as error:  # the system has no thread for it, as beyond a limit of processes
            self._note(f"cannot be followed: {error}")
            self._signal(signal.SIGKILL)
        _await_exit(process)
        with self._lock:  # once waited for, its number may belong to another process
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # what a killed process leaves of its own
            code = process.wait()
            self._process = self.pid = None
        for reader in reading:
            for _ in range(_PARTS):  # in parts: while the machine stands still, only one of them passes
                reader.join(_LAST_LINES_SECONDS / _PARTS)
        _reap_orphans(process.pid)
        with contextlib.suppress(OSError):
            process.stdin.close()
        return code

    def _configure(self, process: Process) -> None:
        if self._configuration:
            with contextlib.suppress(OSError):  # it has died already
                process.stdin.write(f"{self._configuration}\n")
                process.stdin.flush()

    def _gives_up(self, code: int | None, failures: int) -> bool:
        """Return whether to stop trying; then ``failure`` says why."""
        if self._ever_ready or (code != CONFIGURATION_EXIT_CODE and failures < START_ATTEMPTS):
            return False
        if code == CONFIGURATION_EXIT_CODE:
            message = _last_error(self.lines) or f"{self.name} ended with {describe_exit(code)}."
        else:
            last = f": {self.lines[-1]}" if self.lines else "."
            message = f"{self.name} ended {failures} times before it was ready, with {describe_exit(code)}{last}"
        self.failure = ConfigurationError(message)
        self._change(ProcessState.FAILED)
        return True

    def _await_ready(self, stream: IO[str]) -> None:
        with stream:
            while line := stream.readline(_LINE_CHARACTERS):
                if self._ready_since is None and line.startswith(_READY):
                    self._ready_since = time.monotonic()
                    self._ever_ready = True
                    self._change(ProcessState.READY)

    def _pass_on(self, stream: IO[str]) -> None:
        with stream:
            while line := stream.readline(_LINE_CHARACTERS):
                self._note(line.rstrip("\n"))

    def _note(self, line: str) -> None:
        self.lines.append(line)
        self._on_line(self.name, line)

    def _change(self, state: ProcessState) -> None:
        self.state = state
        self._on_change(self)


# ---- in the child ------------------------------------------------------------------------------------------------------


def print_ready(url: str) -> None:
    """Print the ready line, the only one that a server of chiasm prints on standard output."""
    print(f"{_READY}{url}", flush=True)


def end_with_stdin(grace_seconds: float | None = None) -> None:
    """End this process when its standard input closes: by signals, and if those don't help in time, at once.

    The parent holds the other end of the pipe, and the kernel closes that when the parent dies, even by SIGKILL.
    """
    grace = GRACE_SECONDS if grace_seconds is None else grace_seconds
    threading.Thread(target=_watch_stdin, args=(grace,), name="chiasm-lifeline", daemon=True).start()


def _watch_stdin(grace_seconds: float) -> None:
    try:
        while os.read(_STDIN, 4096):
            pass
    except OSError:  # it was never open
        pass
    for number in AT_ONCE:
        os.kill(os.getpid(), number)
    time.sleep(grace_seconds)
    os._exit(1)


# ---- exits -------------------------------------------------------------------------------------------------------------


def describe_exit(code: int | None) -> str:
    """Return a return code of ``subprocess`` in words; None: there was no process."""
    if code is None:
        return "no process"
    if code >= 0:
        return f"exit code {code}"
    if code == -signal.SIGKILL:
        return "SIGKILL, as the kernel sends it when memory runs out"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _await_exit(process: Process) -> None:
    """Wait until the process has ended; it keeps its number until it is reaped."""
    if hasattr(os, "waitid"):
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    else:
        process.wait()


def _reap_orphans(group: int) -> None:
    """Free the numbers of the killed processes of a group that are this process's children.

    They are if this is the first process of a container: whoever loses its parent becomes its child.
    """
    until = time.monotonic() + _REAP_SECONDS
    with contextlib.suppress(ChildProcessError):  # there are no more
        while os.waitpid(-group, os.WNOHANG)[0] or time.monotonic() < until:
            time.sleep(_REAP_SECONDS / _PARTS)


def _last_error(lines: Sequence[str]) -> str | None:
    """Return the message of the last line that begins with ``Error:``."""
    for line in reversed(lines):
        if line.startswith("Error: "):
            return line.removeprefix("Error: ")
    return None
