"""``python -m chiasm.bench.nursery FOLDER``: starts instances as forks of one process that has imported everything.

So a start takes about what loading the model does, and a fleet can be changed a thousand times. Each line of standard input is
the configuration of one instance. Standard output has a line for each thing that happens: ``born PID``, ``ready PID URL``,
``ended PID CODE``. When standard input closes, all that are left are killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import sys
from importlib import import_module
from pathlib import Path

from chiasm.launch.process import InstanceProcess, from_json
from chiasm.launch.run import run_forked


def main() -> None:
    """Serve until standard input closes."""
    _import_all(Path(sys.argv[1]))
    woken, wakes = socket.socketpair()
    woken.setblocking(False)
    wakes.setblocking(False)
    signal.set_wakeup_fd(wakes.fileno())
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    children: set[int] = set()
    with selectors.DefaultSelector() as selector:
        selector.register(sys.stdin.fileno(), selectors.EVENT_READ)
        selector.register(woken, selectors.EVENT_READ)
        rest = b""
        while True:
            for key, _ in selector.select():
                if key.fileobj is woken:
                    with contextlib.suppress(BlockingIOError):
                        woken.recv(4096)
                    _reap(children)
                    continue
                given = os.read(sys.stdin.fileno(), 1 << 16)
                if not given:
                    signal.set_wakeup_fd(-1)
                    for pid in children:
                        os.kill(pid, signal.SIGKILL)
                    return
                *lines, rest = (rest + given).split(b"\n")
                for line in lines:
                    children.add(_bear(line))


def _import_all(folder: Path) -> None:
    """Import what an instance of this checkpoint imports. Nothing is computed, so no thread runs when instances are forked."""
    for module in ("chiasm.engine.encoder", "chiasm.engine.engine", "chiasm.server.process"):
        import_module(module)
    import transformers

    from chiasm.models import load_processor

    load_processor(folder)
    for name in json.loads((folder / "config.json").read_text())["architectures"]:
        getattr(transformers, name)


def _bear(configuration: bytes) -> int:
    """Fork an instance; return its process id. The child never returns."""
    pid = os.fork()
    if pid:
        _say(f"born {pid}")
        return pid
    code = 2
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())
        run_forked(from_json(configuration, InstanceProcess), lambda url: _say(f"ready {os.getpid()} {url}"))
        code = 0
    except BaseException as error:
        print(f"Error: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def _reap(children: set[int]) -> None:
    for pid in list(children):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            children.discard(pid)
            _say(f"ended {pid} {os.waitstatus_to_exitcode(status)}")


def _say(line: str) -> None:
    os.write(1, f"{line}\n".encode())  # whole lines, of all processes


if __name__ == "__main__":
    main()
