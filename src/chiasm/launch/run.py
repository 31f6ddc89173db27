"""Runs one instance or one proxy in this process, until a signal asks it to end."""

from __future__ import annotations

import logging
import os
import socket
import sys
from typing import TYPE_CHECKING, NoReturn

from chiasm.cores import pin_to, share_cores
from chiasm.heap import recycle_large_buffers
from chiasm.http.log_format import formatter
from chiasm.launch.child import end_with_stdin, print_ready
from chiasm.launch.folders import temporary_folder
from chiasm.launch.ports import check_port
from chiasm.launch.process import InstanceProcess, ProcessConfig, ProxyProcess, from_json

if TYPE_CHECKING:
    from chiasm.launch.workers import WorkerProcess

_KEPT_BYTES, _ARENAS = 64 << 20, 4
"""Preprocessing an image of 512 x 512 pixels uses 9 MB, and larger ones in proportion."""


def run_instance(config: InstanceProcess, *, has_parent: bool = False) -> NoReturn:
    """Run an instance. Raises ConfigurationError if it cannot be started.

    With ``has_parent`` a process of chiasm asks it to end.
    """
    _begin(config, config.server.host, config.server.port)
    temporary_folder()  # torch can't be imported without one, and says something else
    share_cores(config.engine.threads)
    recycle_large_buffers(kept_bytes=_KEPT_BYTES, arenas=_ARENAS)

    from chiasm.server import run

    run(
        config.engine,
        config.server,
        served_model_name=config.served_model_name,
        on_ready=print_ready,
        has_parent=has_parent,
    )
    _end_at_once()


def run_proxy(config: ProxyProcess, *, has_parent: bool = False) -> None:
    """Run a proxy. Raises ConfigurationError if it cannot be started.

    With ``has_parent`` a process of chiasm asks it to end.
    """
    _begin(config, config.proxy.host, config.proxy.port)
    if config.workers > 1:
        from chiasm.launch.workers import run_workers

        run_workers(config, has_parent=has_parent)
        return

    from chiasm.proxy import run

    run(config.proxy, on_ready=print_ready, has_parent=has_parent)


def run_worker(config: WorkerProcess) -> None:
    """Run one worker of a proxy. Raises ConfigurationError if it cannot be started."""
    _set_up(config)

    from chiasm.proxy import run
    from chiasm.proxy.siblings import Worker

    worker = Worker(config.number, config.count, config.folder)
    listener = socket.socket(fileno=config.listener)
    run(config.proxy, on_ready=print_ready, worker=worker, listener=listener, has_parent=True)


def run_child(name: str) -> None:
    """Run the process of a deployment called ``name``: its configuration is the first line of standard input.

    It ends when standard input closes, as it does when the parent dies.
    """
    line = sys.stdin.buffer.readline()
    end_with_stdin()
    if not line:  # the parent has died already
        return
    if name == "proxy":
        run_proxy(from_json(line, ProxyProcess), has_parent=True)
    elif name.startswith("worker-"):
        from chiasm.launch.workers import WorkerProcess

        run_worker(from_json(line, WorkerProcess))
    else:
        run_instance(from_json(line, InstanceProcess), has_parent=True)


def _begin(config: ProcessConfig, host: str, port: int) -> None:
    """Set up what both have; a port in use is reported before anything slow is imported."""
    _set_up(config)
    check_port(host, port)


def _set_up(config: ProcessConfig) -> None:
    level = config.log_level.upper()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter(config.log_format))
    logging.basicConfig(level=level, handlers=[handler])
    # No line has the place in the source, the thread or the process, and finding them out costs time for each line.
    logging._srcfile = None  # as Python's documentation says
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    if level == "INFO":
        logging.getLogger("uvicorn").setLevel(logging.WARNING)  # it logs each of its own steps at INFO
    pin_to(config.cpus)


def _end_at_once() -> NoReturn:
    """End the process without unloading torch's modules, which would take a second or more."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
