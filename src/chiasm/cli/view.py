"""Shows a running deployment on standard error."""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from chiasm.launch import ProcessState, ProcessStatus
from chiasm.launch.child import print_ready

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

_LINES_WAITING = 1000
_REFRESH_SECONDS = 0.5
_CLOSE_SECONDS = 0.5
_COLUMNS = {"name": 0, "url": 60, "pid": 80, "state": 0, "restarts": 80, "memory": 80}
"""From which width of the terminal on each of them is shown."""
_COLOURS = {
    ProcessState.STARTING: "yellow",
    ProcessState.READY: "green",
    ProcessState.WAITING: "red",
    ProcessState.FAILED: "red",
    ProcessState.STOPPED: "dim",
}


class View:
    """Log lines and, if standard error is a terminal, a table of the processes below them.

    One thread does all the writing, so that a terminal or pipe that accepts no more output blocks neither an instance nor
    the command; lines that don't fit into the queue meanwhile are counted and dropped.
    """

    def __init__(self) -> None:
        self._waiting: queue.Queue[Callable[[], None] | None] = queue.Queue(_LINES_WAITING)
        self._dropped = 0
        self._is_closed = False
        self._processes: Callable[[], Sequence[ProcessStatus]] = tuple
        self._live: Live | None = None
        self._thread = threading.Thread(target=self._write_all, name="chiasm-view", daemon=True)

    def __enter__(self) -> View:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            # rich must not redirect standard output: it carries the ready line.
            self._live = Live(
                console=Console(stderr=True), auto_refresh=False, redirect_stdout=False, redirect_stderr=False
            )
            self._live.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_closed = True
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=_CLOSE_SECONDS)
        self._thread.join(_CLOSE_SECONDS)

    # ---- from any thread; none of these blocks ------------------------------------------------------------------------

    def show(self, processes: Callable[[], Sequence[ProcessStatus]]) -> None:
        """Keep showing what ``processes`` returns in the table."""
        self._processes = processes

    def line(self, name: str, text: str) -> None:
        """Write a log line of the process called ``name``."""
        self._put(lambda: self._print(f"[{name}] {text}"))

    def change(self, process: ProcessStatus) -> None:
        """Write a process's new state."""
        if process.state is ProcessState.READY:
            self.line(process.name, f"ready at {process.url}, pid {process.pid}")
        elif process.state is not ProcessState.WAITING:  # its log says so already
            self.line(process.name, str(process.state))

    def ready(self, url: str) -> None:
        """Write the ready line to standard output, above the table if both are in one terminal."""
        if self._live is None or not sys.stdout.isatty():
            print_ready(url)
        else:
            self._put(lambda: self._above(lambda: print_ready(url)))

    def _put(self, action: Callable[[], None]) -> None:
        try:
            self._waiting.put_nowait(action)
        except queue.Full:
            self._dropped += 1

    # ---- in its thread ------------------------------------------------------------------------------------------------

    def _write_all(self) -> None:
        while True:
            try:
                action = self._waiting.get(timeout=_REFRESH_SECONDS)
            except queue.Empty:
                if self._is_closed:
                    break
                self._try(self._refresh)
                continue
            if action is None:
                break
            self._try(action)
            if self._waiting.empty():
                self._try(self._report_dropped)
                self._try(self._refresh)
        self._try(self._end_table)

    def _try(self, write: Callable[[], None]) -> None:
        """Write something, if that is possible."""
        try:
            write()
        except (OSError, ValueError):
            self._live = None  # a terminal that fails is gone; a disk that is full may have room again

    def _print(self, line: str) -> None:
        if self._live is None:
            print(line, file=sys.stderr, flush=True)
        else:
            from rich.text import Text

            self._live.console.print(Text(line))

    def _above(self, write: Callable[[], None]) -> None:
        if self._live is None:
            write()
            return
        self._live.update("", refresh=True)
        self._live.stop()
        write()
        self._live.start()

    def _report_dropped(self) -> None:
        if dropped := self._dropped:
            self._print(f"({dropped} log lines were dropped)")
            self._dropped -= dropped

    def _end_table(self) -> None:
        self._refresh()
        if self._live is not None:
            self._live.stop()

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.update(_table(self._processes(), self._live.console.width), refresh=True)


def _table(processes: Sequence[ProcessStatus], width: int) -> Table:
    from rich.table import Column, Table
    from rich.text import Text

    shown = [name for name, least in _COLUMNS.items() if width >= least]
    # Narrow enough for 80 columns; where a name is too long, anything is folded but the URL, which people copy.
    columns = [Column(name, overflow="fold", no_wrap=name == "url") for name in shown]
    table = Table(*columns, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for process in processes:
        memory = process.memory_bytes
        cells = {  # no strings, in which an address such as [fd00::1] would be markup
            "name": Text(process.name),
            "url": Text(process.url),
            "pid": Text(str(process.pid or "")),
            "state": Text(process.progress or process.state, _COLOURS[process.state]),
            "restarts": Text(str(process.restarts)),
            "memory": Text("" if memory is None else f"{memory / 2**20:.0f} MiB"),
        }
        table.add_row(*(cells[name] for name in shown))
    return table
