"""Starts instances as forks of one process that has imported what they need.

Importing torch, transformers and the classes of a model takes five seconds of CPU time, which is most of an instance's start on
a CPU. The fork server imports them once, so that each instance has them at once, at the first start and whenever it is started
again, and all instances share the memory of what was imported.

The server has one thread, so a fork inherits no locks. An instance is not its child but a child of the process that asked for
it, which can wait for it and signal it like any process that it starts itself, whether or not the server still runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from chiasm.launch.child import Process

COMMAND = "fork-server"
"""The command of ``chiasm`` that calls :func:`serve`; for this module, not for people."""
_STDIN, _STDOUT, _STDERR = 0, 1, 2
_LENGTH_BYTES = 4
_MAX_REQUEST_BYTES = 16 << 20
_PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 36, 37
_ENDED = "the process that forks instances has ended"
_adopting_lock = threading.Lock()


class _Request(msgspec.Struct, frozen=True):
    name: str
    """Of the process in its deployment."""
    title: str
    """What ``ps`` shows as its command."""
    folder: str
    """Of the checkpoint whose classes it needs."""
    environment: dict[str, str]


def is_available() -> bool:
    """Return whether the system has what a fork server needs: only Linux lets a process adopt what another has forked."""
    return sys.platform == "linux"


class ForkServer:
    """The process that is forked, as the process that asks for forks sees it. It starts with the first fork.

    All methods may be called in any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # one request at a time
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._closed = False

    def start(self, folder: Path, command: Sequence[str], environment: Mapping[str, str]) -> Process:
        """Start what ``command``, which ends with ``child NAME``, would start, for a checkpoint in ``folder``.

        The first start takes seconds, in which the server imports. Raises OSError if the server cannot be started, or ends.
        """
        request = msgspec.json.encode(_Request(command[-1], " ".join(command), str(folder), dict(environment)))
        with self._lock, contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            control = self._running()
            (their_in, our_in), (our_out, their_out), (our_err, their_err) = [os.pipe() for _ in range(3)]
            descriptors = (their_in, their_out, their_err)
            for descriptor in descriptors:
                theirs.callback(os.close, descriptor)
            stdin = ours.enter_context(os.fdopen(our_in, "w", encoding="utf-8"))
            stdout, stderr = (
                ours.enter_context(os.fdopen(read, encoding="utf-8", errors="replace")) for read in (our_out, our_err)
            )
            pid = 0
            with _adopting(), contextlib.suppress(ConnectionError):
                socket.send_fds(control, [len(request).to_bytes(_LENGTH_BYTES)], descriptors)
                control.sendall(request)
                pid = int.from_bytes(_receive(control, _LENGTH_BYTES))
            if not pid:
                self._discard()
                raise OSError(_ENDED)
            ours.pop_all()
        return Process(pid, stdin, stdout, stderr, lambda: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    def close(self) -> None:
        """End the server; what was forked runs on. A ``start`` that waits for it fails, and so do all later ones."""
        self._closed = True
        if (process := self._process) is not None:
            process.kill()
        with self._lock:
            self._discard()

    def _running(self) -> socket.socket:
        if self._closed:
            raise OSError(_ENDED)
        if self._control is None:
            self._control, theirs = socket.socketpair()
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "chiasm", COMMAND],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C in the terminal isn't for it
                )
            if self._closed:  # meanwhile
                self._discard()
                raise OSError(_ENDED)
        return self._control

    def _discard(self) -> None:
        """Forget the server, so that the next fork starts another one."""
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._control = self._process = None


@contextlib.contextmanager
def _adopting() -> Iterator[None]:
    """Be the parent of whatever loses its parent meanwhile and descends from this process."""
    libc = ctypes.CDLL(None)
    before = ctypes.c_int()
    with _adopting_lock:
        libc.prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0)
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        try:
            yield
        finally:
            libc.prctl(_PR_SET_CHILD_SUBREAPER, before.value, 0, 0, 0)


# ---- in the server -----------------------------------------------------------------------------------------------------


def serve() -> str | None:
    """Fork for whoever is at the other end of standard input, a socket, until it is gone.

    Return None then, and in each fork the name of the process that it is to be. A fork has a session and standard streams
    of its own, and the environment and command line that were asked for.
    """
    control = socket.socket(fileno=os.dup(_STDIN))
    while (found := _next_request(control)) is not None:
        request, descriptors = found
        _import_for(Path(request.folder))
        gc.collect()
        gc.freeze()  # a collection in a fork would copy the memory that it shares
        told, tell = os.pipe()
        middle = os.fork()
        if not middle:
            if os.fork():  # its parent ends, so it gets the nearest process that adopts
                os._exit(0)
            control.close()
            os.close(told)
            _become(request, descriptors)
            # Only now, since whoever asked may signal its session at once.
            os.write(tell, os.getpid().to_bytes(_LENGTH_BYTES))
            os.close(tell)
            return request.name
        for descriptor in (tell, *descriptors):
            os.close(descriptor)
        os.waitpid(middle, 0)
        control.sendall(os.read(told, _LENGTH_BYTES) or bytes(_LENGTH_BYTES))  # 0: it has died
        os.close(told)
    return None


def _next_request(control: socket.socket) -> tuple[_Request, list[int]] | None:
    head, descriptors, _, _ = socket.recv_fds(control, _LENGTH_BYTES, 3)
    size = int.from_bytes(head)
    if not head or size > _MAX_REQUEST_BYTES:
        return None
    body = _receive(control, size)
    return (msgspec.json.decode(body, type=_Request), descriptors) if len(body) == size else None


def _import_for(folder: Path) -> None:
    """Import what an instance imports, also of transformers, which imports much only when it is used."""
    with contextlib.suppress(Exception):  # it happens again in the instance, which reports it
        import uvloop  # noqa: F401

        import chiasm.engine.encoder
        import chiasm.engine.engine
        import chiasm.server.process  # noqa: F401
        from chiasm.models.adapter import import_classes

        import_classes(folder)


def _become(request: _Request, descriptors: Sequence[int]) -> None:
    os.setsid()
    for descriptor, stream in zip(descriptors, (_STDIN, _STDOUT, _STDERR), strict=True):
        os.dup2(descriptor, stream)
        os.close(descriptor)
    from setproctitle import setproctitle

    setproctitle(request.title)  # first, because it writes where the environment of the server was
    os.environ.clear()
    os.environ.update(request.environment)


def _receive(connection: socket.socket, size: int) -> bytes:
    """Return ``size`` bytes, or fewer if the other end is closed before."""
    parts = bytearray()
    while len(parts) < size:
        part = connection.recv(size - len(parts))
        if not part:
            break
        parts += part
    return bytes(parts)
