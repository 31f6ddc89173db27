"""Instances in processes of their own, which a test tells what to do, and may kill."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import psutil
import pytest

from chiasm.kv_transfer import KVLayout, KVTransferConfig
from chiasm.wire import KVTransferParams

from ..transfer.holder import be_patient
from .instance import LAYOUT, NUM_BLOCKS, PATIENCE_SECONDS, Instance

PROCESSES = multiprocessing.get_context("forkserver")  # torch is imported once for all of them
PROCESSES.set_forkserver_preload([__name__])


class InstanceProcess:
    """An :class:`Instance` elsewhere. ``call`` runs one of its methods there and returns what that returned."""

    def __init__(
        self,
        config: KVTransferConfig,
        layout: KVLayout = LAYOUT,
        num_blocks: int = NUM_BLOCKS,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.config = config
        self._pipe, theirs = PROCESSES.Pipe()
        arguments = (theirs, config, layout, num_blocks, dict(os.environ) | (environment or {}))
        self._process = PROCESSES.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        assert self._receive() == "ready"

    def __enter__(self) -> InstanceProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def tell(self, method: str, *arguments: Any) -> None:
        """Begin a call without waiting for its end."""
        self._pipe.send((method, arguments))

    def call(self, method: str, *arguments: Any) -> Any:
        self.tell(method, *arguments)
        return self._receive()

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def idle_share(self, seconds: float) -> float:
        """The share of one core that it uses while nobody tells it anything, over that time."""
        process = psutil.Process(self.pid)
        before = process.cpu_times()
        time.sleep(seconds)  # what is measured is what happens meanwhile
        after = process.cpu_times()
        return float(after.user + after.system - before.user - before.system) / seconds

    def _receive(self) -> Any:
        assert self._pipe.poll(PATIENCE_SECONDS), "the process did not answer"
        succeeded, result = self._pipe.recv()
        if not succeeded:
            raise AssertionError(result)
        return result


class _Commands(Instance):
    """What a test can tell an instance in another process."""

    def wait_until_sent(self, request_id: str) -> None:
        self.wait_for(lambda seen: request_id in seen.sent)

    def claim(self, request_id: str, handle: KVTransferParams) -> None:
        """Until the claim is granted."""
        before = self.worker.stats.claim_seconds
        self.claimed = self.arrive(request_id, handle)
        self.step()
        give_up = time.monotonic() + PATIENCE_SECONDS
        while self.worker.stats.claim_seconds == before:
            assert time.monotonic() < give_up

    def begin(self, local: list[int]) -> None:
        """There is room for what was claimed; the transfer begins."""
        self.load(self.claimed, local)
        self.step()


def _serve(
    pipe: Connection, config: KVTransferConfig, layout: KVLayout, num_blocks: int, environment: dict[str, str]
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(environment)
    be_patient(pytest.MonkeyPatch())
    instance = _Commands(config, layout, num_blocks)
    pipe.send((True, "ready"))
    with contextlib.suppress(EOFError):
        while True:
            method, arguments = pipe.recv()
            try:
                pipe.send((True, getattr(instance, method)(*arguments)))
            except Exception as error:
                pipe.send((False, repr(error)))
    instance.shutdown()


@contextlib.contextmanager
def stopped(process: InstanceProcess) -> Iterator[None]:
    """Meanwhile the process does nothing at all."""
    process.signal(signal.SIGSTOP)
    threads = [f"/proc/{process.pid}/task/{task}/stat" for task in os.listdir(f"/proc/{process.pid}/task")]
    while any(_state(thread) != "T" for thread in threads):  # it takes a moment
        pass
    try:
        yield
    finally:
        process.signal(signal.SIGCONT)


def _state(stat_path: str) -> str:
    """A thread that has ended stands as still as one that is stopped."""
    try:
        with open(stat_path) as file:
            return file.read().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "T"
