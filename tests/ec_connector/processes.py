"""Encoders in processes of their own, which a test tells what to do, and may stop or kill."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import nullcontext
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import torch

from chiasm.ec_transfer.entry_file import HEADER_BYTES
from chiasm.errors import StorageError
from chiasm.wire import ECPlace
from tests.hosts import Host

from .instance import embedding_of
from .peers import PATIENCE_SECONDS, Encoder

PROCESSES = multiprocessing.get_context("forkserver")  # torch is imported once for all of them
PROCESSES.set_forkserver_preload([__name__])


class EncoderProcess:
    """An :class:`Encoder` elsewhere, on the host ``there`` if that is given, whose embeddings are those of ``embedding_of``."""

    def __init__(self, connector: str, there: Host | None = None, **settings: Any) -> None:
        self._pipe, theirs = PROCESSES.Pipe()
        arguments = (theirs, connector, there, settings, dict(os.environ))
        self._process = PROCESSES.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        place = self.hear()
        assert isinstance(place, ECPlace)
        self.place = place

    def __enter__(self) -> EncoderProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.kill()

    def tell(self, name: str, rows: int = 4) -> None:
        """Have it make and publish an embedding, without waiting for that."""
        self._pipe.send((name, rows))

    def encode(self, name: str, rows: int = 4) -> str:
        """Have it make and publish an embedding; return the identifier."""
        self.tell(name, rows)
        return str(self.hear())

    def hear(self) -> Any:
        """Wait until it has done the next thing that it was told."""
        assert self._pipe.poll(2 * PATIENCE_SECONDS), "the encoder did not answer"
        return self._pipe.recv()

    def check_all_is_free(self) -> None:
        """Nothing is pinned, or soon not any more: an entry of the size of all its memory finds room."""
        self._pipe.send(None)
        assert self.hear(), "an embedding that nobody reads any more is still pinned"

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def stop(self) -> None:
        """It does nothing at all until it continues. Returns when all its threads stand still."""
        os.kill(self.pid, signal.SIGSTOP)
        while any(_state(f"/proc/{self.pid}/task/{task}/stat") != "T" for task in os.listdir(f"/proc/{self.pid}/task")):
            pass

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def end(self) -> None:
        """Have it end by itself, and wait until it is gone."""
        self._pipe.close()
        self._process.join()

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone; idempotent."""
        self._process.kill()
        self._process.join()
        self._pipe.close()


@contextlib.contextmanager
def stopped(process: EncoderProcess) -> Iterator[None]:
    process.stop()
    try:
        yield
    finally:
        process.resume()


def _serve(
    pipe: Connection, connector: str, there: Host | None, settings: dict[str, Any], environment: dict[str, str]
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(environment)
    with nullcontext() if there is None else there.inside():
        encoder = Encoder(connector, **settings)
        pipe.send(encoder.place)
        with contextlib.suppress(EOFError):
            while True:
                told = pipe.recv()
                pipe.send(_fill(encoder) if told is None else encoder.encode(told[0], embedding_of(*told)))
        encoder.close()


def _fill(encoder: Encoder) -> bool:
    """Return whether all of the memory is free, within some time."""
    all_of_it = torch.empty(encoder.worker.config.max_bytes - HEADER_BYTES, dtype=torch.uint8)
    give_up = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < give_up:
        with contextlib.suppress(StorageError):
            encoder.holding.discard(encoder.encode("all", all_of_it), "of no use")
            return True
        time.sleep(0.01)  # there is no event to wait for
    return False


def _state(stat_path: str) -> str:
    """Return the letter of a thread's state; none if the thread has ended."""
    try:
        with open(stat_path) as file:
            return file.read().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""
