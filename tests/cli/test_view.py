"""The view of a deployment on standard error."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import os
import pty
import subprocess
import sys
import threading

import pytest
from rich.console import Console

from chiasm.cli.view import View, _table
from chiasm.launch import ProcessState, ProcessStatus
from chiasm.wire import Role

PD = ProcessStatus("pd-0", Role.PD, "http://127.0.0.1:1", os.getpid(), ProcessState.READY, 2)


def test_without_a_terminal_there_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with View() as view:
        view.show(lambda: [PD])
        view.line("encoder-0", "loading")
        view.change(PD)
        view.ready("http://127.0.0.1:8000")
    _until_all_is_written()
    out, err = capsys.readouterr()
    assert out == "ready http://127.0.0.1:8000\n"
    assert err == f"[encoder-0] loading\n[pd-0] ready at http://127.0.0.1:1, pid {os.getpid()}\n"


def test_in_a_terminal_there_is_a_table_below_the_lines() -> None:
    code = (
        "from chiasm.cli.view import View; from tests.cli.test_view import PD, _until_all_is_written\n"
        "with View() as view:\n"
        "    view.show(lambda: [PD]); view.line('encoder-0', '[loading]'); view.ready('http://127.0.0.1:8000')\n"
        "_until_all_is_written()"
    )
    ours, theirs = pty.openpty()
    try:
        environment = dict(os.environ, COLUMNS="120", TERM="xterm")
        with subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=theirs, text=True, env=environment
        ) as process:
            os.close(theirs)
            shown = b""
            while chunk := _read(ours):
                shown += chunk
            out, _ = process.communicate(timeout=30)
    finally:
        os.close(ours)
    text = shown.decode()
    assert out == "ready http://127.0.0.1:8000\n"
    assert "[encoder-0] [loading]" in text
    last = text[text.rindex("restarts") :]
    assert "pd-0" in last
    assert "http://127.0.0.1:1" in last
    assert "MiB" in last


@pytest.mark.parametrize("width", [60, 80, 200])
def test_every_row_of_the_table_is_one_line_with_the_whole_url(width: int) -> None:
    names = ["proxy", "encoder-10", "aggregated-10", "prefill-0", "decode-0"]
    loading = dict.fromkeys(("encoder-10", "aggregated-10"), "1350/1625 tensors")
    shown = io.StringIO()
    console = Console(file=shown, width=width)
    rows = [
        ProcessStatus(
            name, None, f"http://127.0.0.1:{40000 + n}", os.getpid(), ProcessState.STARTING, 12, loading.get(name, "")
        )
        for n, name in enumerate(names)
    ]
    console.print(_table(rows, width))
    lines = shown.getvalue().splitlines()
    for row in rows:
        assert any(row.name in line and row.url in line for line in lines), shown.getvalue()
    assert "1350/1625" in shown.getvalue()


def test_in_a_narrow_terminal_a_row_of_the_table_is_one_line_with_the_state() -> None:
    shown = io.StringIO()
    Console(file=shown, width=40).print(_table([PD], 40))
    assert [line.split() for line in shown.getvalue().splitlines()] == [["name", "state"], ["pd-0", "ready"]]


def test_a_full_pipe_blocks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    full = os.fdopen(writer, "w")
    monkeypatch.setattr(sys, "stderr", full)

    def show() -> None:
        with View() as view:
            for _ in range(5000):
                view.line("pd-0", "x" * 1000)

    showing = threading.Thread(target=show, daemon=True)
    showing.start()
    showing.join(60)
    assert not showing.is_alive()
    os.close(reader)  # or closing the other end would wait for ever
    _until_all_is_written()
    with contextlib.suppress(BrokenPipeError):
        full.close()


class Disk(io.StringIO):
    """A file on a disk that has no room for some lines."""

    def __init__(self, *refused: str) -> None:
        super().__init__()
        self._refused = refused

    def write(self, text: str) -> int:
        if text in self._refused:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(text)


def test_lines_are_written_again_when_a_full_disk_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk("[pd-0] two")
    monkeypatch.setattr(sys, "stderr", disk)
    with View() as view:
        for line in ("one", "two", "three"):
            view.line("pd-0", line)
    _until_all_is_written()
    assert [line for line in disk.getvalue().splitlines() if line] == ["[pd-0] one", "[pd-0] three"]


def test_an_address_is_no_markup() -> None:
    shown = io.StringIO()
    away = dataclasses.replace(PD, url="http://[fd00::1]:8000")
    Console(file=shown, width=120).print(_table([away], 120))
    assert away.url in shown.getvalue()


def _until_all_is_written() -> None:
    """Wait for the thread of a view that was closed, for which the view itself doesn't wait long."""
    for thread in threading.enumerate():
        if thread.name == "chiasm-view":
            thread.join(60)


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # Linux says so when the other side is closed
        return b""
