"""The data plane for any hosts and for GPU memory: NIXL reads over the best transport that UCX finds.

A holder registers its memory with an agent, whose metadata is in the description. A reader creates one agent for each holder,
so that it can give up one that hangs without the others: UCX can break off a read only together with everything else that its
worker does.

No agent has a progress thread, which would keep a core busy. A reader drives its agents on the threads that read. A holder
drives its agent on the control thread while something may be read, for transports without remote memory access (TCP). UCX reads
its own environment, such as ``UCX_TLS``.
"""

from __future__ import annotations

import importlib
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from chiasm.errors import ConfigurationError
from chiasm.extras import Extra, install_command
from chiasm.transfer.errors import TransferError
from chiasm.transfer.memory import (
    DataPlane,
    Memory,
    OfferedMemory,
    Peer,
    ReachedMemory,
    Run,
    batches_of,
    check_remote,
    read_description,
)

_logger = logging.getLogger(__name__)

MODULES = ("nixl", "nixl_cu13", "nixl_cu12")
"""The names of the library: the first package picks one of the others, which are builds for one CUDA version."""
BACKEND = "UCX"
_BYTES_AT_A_TIME = 64 << 20
_RUNS_AT_A_TIME = 1 << 14
_SHORTEST_SLEEP_SECONDS = 20e-6
_LONGEST_SLEEP_SECONDS = 1e-3
_PATIENCE_SECONDS = 5.0
"""How long a holder may take to end a read that is no longer needed, before its agent is destroyed."""
_SLOWEST_BYTES_PER_SECOND = 2e6
"""A read that is needed may take so much longer. If it takes more, the holder stands still, which NIXL doesn't notice."""


class _Description(msgspec.Struct, frozen=True):
    """How another agent reads a holder's memory, which begins at ``address``."""

    agent_metadata: bytes
    address: int
    num_bytes: int
    device_id: int


class NixlPlane(DataPlane):
    """Moves bytes between processes of any hosts, in host or GPU memory.

    Raises ConfigurationError if NIXL or its UCX backend is missing. Its readers can read all of the memory that is offered:
    NIXL grants whole registrations.
    """

    def __init__(self, name: str) -> None:
        """``name`` is unique among all holders; their agents have it."""
        self._library = import_nixl()
        self._name = name

    def offer(self, memory: Memory) -> OfferedMemory:
        return _RegisteredMemory(Agent(self._library, self._name, memory))

    def prepare(self, memory: Memory) -> None:
        Agent(self._library, self._new_name(), memory).close()

    def reach(self, peer: Peer, description: bytes, memory: Memory) -> ReachedMemory:
        try:
            agent = Agent(self._library, self._new_name(), memory)
        except ConfigurationError as error:
            raise TransferError(error.message.removesuffix(".")) from error
        return _RemoteMemory(agent, description)

    def _new_name(self) -> str:
        return f"{self._name}-{secrets.token_hex(8)}"


class Agent:
    """An agent with one registered piece of memory. Raises ConfigurationError if NIXL can't create it."""

    def __init__(self, library: Any, name: str, memory: Memory) -> None:
        kind, _, number = memory.device.partition(":")
        self.memory = memory
        self.kind = "DRAM" if kind == "cpu" else "VRAM"
        self.device_id = int(number or 0)
        sync = library.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
        try:
            self.api: Any = library.nixl_agent(
                name, library.nixl_agent_config(enable_prog_thread=False, backends=[BACKEND], sync_mode=sync)
            )
            if BACKEND not in self.api.backends:
                raise ConfigurationError(f"NixlConnector needs the {BACKEND} backend, and this NIXL comes without it.")
            region = [(memory.address, memory.num_bytes, self.device_id, "")]
            self._registered: Any = self.api.register_memory(region, self.kind, [BACKEND])
        except ConfigurationError:
            raise
        except Exception as error:  # the library's errors have no common base
            raise ConfigurationError(
                f"NIXL cannot serve memory on {memory.device}: {error}; "
                f"UCX_TLS is {os.environ.get('UCX_TLS', 'not set')}."
            ) from error

    def progress(self) -> None:
        """Have UCX do what there is to do for others' reads and this agent's own."""
        try:
            self.api.get_new_notifs()  # returns nothing, but drives UCX
        except Exception as error:
            _logger.warning("NIXL could not continue its reads: %s", error)

    def close(self) -> None:
        """Break off everything that is under way; idempotent."""
        if self.api is not None:
            try:
                self.api.deregister_memory(self._registered, [BACKEND])
            except Exception as error:
                _logger.warning("NIXL could not deregister memory: %s", error)
            self.api = self._registered = None


class _RegisteredMemory(OfferedMemory):
    progress_seconds = 1e-3

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        memory = agent.memory
        metadata = agent.api.get_agent_metadata()
        self._description = msgspec.msgpack.encode(
            _Description(metadata, memory.address, memory.num_bytes, agent.device_id)
        )

    def describe(self, reader: int) -> bytes:
        return self._description

    def progress(self) -> None:
        self._agent.progress()

    def close(self) -> None:
        self._agent.close()


class _RemoteMemory(ReachedMemory):
    """A holder's memory, and the agent that reads it and no other."""

    def __init__(self, agent: Agent, description: bytes) -> None:
        self._agent = agent
        self._lock = threading.Lock()
        self._num_readers = 0
        self._broken = False
        self._closed = threading.Event()
        try:
            self._offered = read_description(description, _Description)
            self._remote_name = agent.api.add_remote_agent(self._offered.agent_metadata)
        except Exception as error:
            self.close()
            raise TransferError(f"NIXL cannot reach its memory: {error}") from error

    def read(
        self, runs: Sequence[Run], stop: Callable[[], bool], received: Callable[[int], None] = lambda num_bytes: None
    ) -> bool:
        with self._lock:
            if self._broken:
                raise TransferError("another read from it failed")
            self._num_readers += 1
        try:
            for batch in batches_of(runs, max_bytes=_BYTES_AT_A_TIME, max_runs=_RUNS_AT_A_TIME):
                if stop():
                    return False
                for run in batch:
                    check_remote(run, self._offered.num_bytes)
                failure = self._read(batch, stop)
                if failure is not None:
                    self._broken = True
                    raise TransferError(failure)
                received(sum(run.num_bytes for run in batch))
            return not stop()
        finally:
            self._leave()

    def _read(self, runs: Sequence[Run], stop: Callable[[], bool]) -> str | None:
        """Read some runs. Return None if they are here, otherwise why not; then the agent can't be used any more.

        This doesn't raise: the traceback would refer to the agent, which has to be destroyed.
        """
        api = self._agent.api
        begun = time.monotonic()
        num_bytes = sum(run.num_bytes for run in runs)
        give_up, is_needed = begun + _PATIENCE_SECONDS + num_bytes / _SLOWEST_BYTES_PER_SECOND, True
        try:
            offered, agent = self._offered, self._agent
            array = np.fromiter(chain.from_iterable(runs), np.uint64, 3 * len(runs)).reshape(-1, 3)
            local = self._list(array[:, 0], array[:, 2], agent.memory.address, agent.device_id)
            remote = self._list(array[:, 1], array[:, 2], offered.address, offered.device_id)
            handle = api.initialize_xfer("READ", local, remote, self._remote_name, b"", [BACKEND])
            state = api.transfer(handle)
            while state == "PROC":
                now = time.monotonic()
                time.sleep(min(max((now - begun) / 10, _SHORTEST_SLEEP_SECONDS), _LONGEST_SLEEP_SECONDS))
                state = api.check_xfer_state(handle)
                if is_needed and stop():
                    give_up, is_needed = min(give_up, now + _PATIENCE_SECONDS), False
                if self._broken or now > give_up:
                    return "NIXL's read did not end"
            return None if state == "DONE" else "NIXL's read failed"
        except Exception as error:  # the library's errors have no common base
            return f"NIXL cannot read its memory: {error}"

    def _list(self, offsets: npt.NDArray[np.uint64], sizes: npt.NDArray[np.uint64], address: int, device: int) -> Any:
        """List ranges of one memory for NIXL: address, length and device of each."""
        devices = np.full(len(offsets), device, np.uint64)
        return self._agent.api.get_xfer_descs(
            np.stack([offsets + np.uint64(address), sizes, devices], axis=1), self._agent.kind
        )

    def _leave(self) -> None:
        """End a read. The last reader of a broken agent destroys it; the others wait, so that nothing is written later."""
        with self._lock:
            self._num_readers -= 1
            if self._broken and not self._num_readers:
                # A copy out of another process of this host goes on although NIXL says that it has failed, and UCX aborts
                # this process if it is broken off. Driving UCX ends it.
                self._agent.progress()
                self.close()
        if self._broken:
            self._closed.wait()

    def close(self) -> None:
        self._agent.close()
        self._closed.set()


def import_nixl() -> Any:
    """Import and return the library. Raises ConfigurationError if it isn't installed or can't be loaded."""
    reasons: list[str] = []
    for name in MODULES:
        try:
            library = importlib.import_module(name)
        except ImportError as error:
            reasons.append(str(error))
            continue
        if not hasattr(library, "nixl_agent"):  # a folder with that name
            reasons.append(f"{name!r} is another module")
            continue
        if "NIXL_LOG_LEVEL" not in os.environ:
            logging.getLogger("nixl").setLevel(logging.WARNING)  # otherwise it writes to standard output
        return library
    raise ConfigurationError(
        f"NixlConnector needs NIXL: run {install_command(Extra.NIXL)} in a clone of chiasm, or install nixl-cu12 or nixl-cu13 "
        f"({'; '.join(reasons)})."
    )
