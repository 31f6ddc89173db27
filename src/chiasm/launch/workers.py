"""One proxy as several processes on one port: each is a whole proxy, and one that dies is started again.

This process takes the port and lends it to the workers, so connections wait while one of them is started again. It serves
nothing itself.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from chiasm.errors import ConfigurationError
from chiasm.http.listen import bind, url_of
from chiasm.launch.child import Child, ProcessState, print_ready, start_process
from chiasm.launch.folders import LockedFolder, in_memory
from chiasm.launch.process import ProcessConfig, ProxyProcess, to_json
from chiasm.launch.signals import EndSignals
from chiasm.proxy.config import ProxyConfig

_POLL_SECONDS = 0.1
_END_SECONDS = 5.0
"""Time beyond that of running requests, after which workers are killed."""
_PREFIX = "chiasm-workers-"


@dataclass(frozen=True, kw_only=True)
class WorkerProcess(ProcessConfig):
    """One of the workers of a proxy."""

    proxy: ProxyConfig
    listener: int
    """The descriptor of the socket that listens."""
    number: int
    count: int
    folder: Path
    """Where the workers' sockets are."""


def run_workers(config: ProxyProcess, *, has_parent: bool = False) -> None:
    """Run ``config.workers`` workers until SIGTERM or SIGINT, and until what runs in them has ended; on the main thread.

    With ``has_parent`` another process of chiasm asks for that. Raises ConfigurationError if they cannot be started.
    """
    listener = bind(config.proxy.host, config.proxy.port)
    url = url_of(listener, config.proxy.http.scheme)
    folder = LockedFolder(_PREFIX, in_memory())  # a short path, as addresses of sockets have to be
    workers = [_worker(config, number, listener.fileno(), folder.path) for number in range(config.workers)]
    try:
        with EndSignals(has_parent=has_parent) as signals:
            for one in workers:
                one.start()
            is_announced = False
            while signals.received is None:
                _check(workers)
                if not is_announced and all(one.state is ProcessState.READY for one in workers):
                    print_ready(url)
                    is_announced = True
                time.sleep(_POLL_SECONDS)
            listener.close()  # who connects from now on is refused as soon as the workers have ended
            _end(workers, signals, config.proxy.shutdown_timeout_seconds)
    finally:
        for one in workers:
            one.kill()
            one.join(_END_SECONDS)
        listener.close()
        folder.remove()


def _worker(config: ProxyProcess, number: int, listener: int, folder: Path) -> Child:
    process = WorkerProcess(
        proxy=config.proxy,
        cpus=config.cpus,
        log_level=config.log_level,
        log_format=config.log_format,
        listener=listener,
        number=number,
        count=config.workers,
        folder=folder,
    )
    name = f"worker-{number}"
    return Child(
        name,
        [sys.executable, "-m", "chiasm", "child", name],
        dict(os.environ),
        configuration=to_json(process),
        start=partial(start_process, inherited=(listener,)),
        on_change=lambda child: None,
        on_line=_pass_on,
    )


_lines = threading.Lock()


def _pass_on(name: str, line: str) -> None:
    with _lines, contextlib.suppress(OSError):  # as when nobody reads it any more, or its disk is full for a while
        print(line, file=sys.stderr, flush=True)


def _check(workers: list[Child]) -> None:
    for one in workers:
        if one.state is ProcessState.FAILED:
            raise one.failure or ConfigurationError(f"{one.name} cannot be started.")


def _end(workers: list[Child], signals: EndSignals, timeout_seconds: float) -> None:
    """Let all workers end, at once after a second signal."""
    for one in workers:
        one.end()
    until = time.monotonic() + timeout_seconds + _END_SECONDS
    is_hurried = False
    while time.monotonic() < until and not all(one.join(0.0) for one in workers):
        if signals.are_repeated and not is_hurried:
            is_hurried = True
            for one in workers:
                one.end(at_once=True)
        time.sleep(_POLL_SECONDS)
