"""The connector for instances on any hosts: NIXL reads the producer's blocks over the best transport that UCX finds.

A producer registers its KV cache with an agent, whose metadata is part of the handshake. A consumer creates one agent for each
producer, so that it can give up a producer that hangs without the others: UCX can break off a read only together with
everything else that its worker does.

No agent has a progress thread, which would keep a core busy. A consumer drives its agents on the transfer threads while it
reads. A producer drives its agent on the control thread while blocks are claimed, for transports without remote memory access
(TCP). UCX reads its own environment, such as ``UCX_TLS``.
"""

from __future__ import annotations

import importlib
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from chiasm.errors import ConfigurationError
from chiasm.extras import Extra, install_command
from chiasm.kv_transfer.base import KVConnectorRole, KVTransferConfig, OfferedMemory, ReachedMemory, TransferError
from chiasm.kv_transfer.control import Welcome
from chiasm.kv_transfer.pull import PullConnector

_logger = logging.getLogger(__name__)

MODULES = ("nixl", "nixl_cu13", "nixl_cu12")
"""The names of the library: the first package picks one of the others, which are builds for one CUDA version."""
BACKEND = "UCX"
_BYTES_AT_A_TIME = 64 << 20
_SHORTEST_SLEEP_SECONDS = 20e-6
_LONGEST_SLEEP_SECONDS = 1e-3
_PATIENCE_SECONDS = 5.0
"""How long a producer may take to end a read that is no longer needed, before its agent is destroyed."""


class _Description(msgspec.Struct, frozen=True):
    """How another agent reads a producer's blocks, the first of which is at ``address``."""

    agent_metadata: bytes
    address: int
    device_id: int


class NixlConnector(PullConnector):
    """Moves blocks between instances on any hosts, in host or GPU memory.

    Raises ConfigurationError if NIXL or its UCX backend is missing.
    """

    def __init__(self, config: KVTransferConfig, role: KVConnectorRole) -> None:
        super().__init__(config, role)
        self._library: Any = import_nixl() if role is KVConnectorRole.WORKER else None
        self._blocks: torch.Tensor | None = None

    def offer(self, blocks: torch.Tensor) -> OfferedMemory:
        return _RegisteredBlocks(Agent(self._library, self.config.engine_id, blocks))

    def prepare(self, blocks: torch.Tensor) -> None:
        Agent(self._library, self._new_name(), blocks).close()  # report at the start what doesn't work
        self._blocks = blocks

    def reach(self, welcome: Welcome) -> ReachedMemory:
        assert self._blocks is not None
        try:
            agent = Agent(self._library, self._new_name(), self._blocks)
        except ConfigurationError as error:
            raise TransferError(error.message.removesuffix(".")) from error
        return _RemoteBlocks(agent, welcome)

    def close_memory(self) -> None:
        self._blocks = None

    def _new_name(self) -> str:
        return f"{self.config.engine_id}-{secrets.token_hex(8)}"


class Agent:
    """An agent with one registered KV cache. Raises ConfigurationError if NIXL can't create it."""

    def __init__(self, library: Any, name: str, blocks: torch.Tensor) -> None:
        self.blocks = blocks
        self.kind = "DRAM" if blocks.device.type == "cpu" else "VRAM"
        self.device_id = blocks.device.index or 0
        sync = library.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
        try:
            self.api: Any = library.nixl_agent(
                name, library.nixl_agent_config(enable_prog_thread=False, backends=[BACKEND], sync_mode=sync)
            )
            if BACKEND not in self.api.backends:
                raise ConfigurationError(f"NixlConnector needs the {BACKEND} backend, and this NIXL comes without it.")
            region = [(blocks.data_ptr(), blocks.nbytes, self.device_id, "")]
            self._registered: Any = self.api.register_memory(region, self.kind, [BACKEND])
        except ConfigurationError:
            raise
        except Exception as error:  # the library's errors have no common base
            raise ConfigurationError(
                f"NIXL cannot serve the KV cache on {blocks.device}: {error}; "
                f"UCX_TLS is {os.environ.get('UCX_TLS', 'not set')}."
            ) from error

    def list_blocks(self, agent_name: str, address: int, num_blocks: int, device_id: int) -> Any:
        """Prepare the list of an agent's blocks, which are contiguous from ``address`` on."""
        block_bytes = self.blocks.shape[1]
        addresses = np.arange(num_blocks, dtype=np.uint64) * np.uint64(block_bytes) + np.uint64(address)
        sizes, devices = np.full(num_blocks, block_bytes), np.full(num_blocks, device_id)
        descriptors = np.stack([addresses, sizes.astype(np.uint64), devices.astype(np.uint64)], axis=1)
        return self.api.prep_xfer_dlist(agent_name, descriptors, self.kind, [BACKEND])

    def close(self) -> None:
        """Break off everything that is under way; idempotent."""
        if self.api is not None:
            try:
                self.api.deregister_memory(self._registered, [BACKEND])
            except Exception as error:
                _logger.warning("NIXL could not deregister the KV cache: %s", error)
            self.api = self._registered = None


class _RegisteredBlocks(OfferedMemory):
    progress_seconds = 1e-3

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def description(self) -> bytes:
        agent = self._agent
        description = _Description(agent.api.get_agent_metadata(), agent.blocks.data_ptr(), agent.device_id)
        return msgspec.msgpack.encode(description)

    def progress(self) -> None:
        try:
            self._agent.api.get_new_notifs()  # returns nothing, but drives UCX
        except Exception as error:
            _logger.warning("NIXL could not continue the reads of decode instances: %s", error)

    def close(self) -> None:
        self._agent.close()


class _RemoteBlocks(ReachedMemory):
    """A producer's blocks, and the agent that reads them and no others."""

    def __init__(self, agent: Agent, welcome: Welcome) -> None:
        self._agent = agent
        self._lock = threading.Lock()
        self._num_readers = 0
        self._broken = False
        self._closed = threading.Event()
        try:
            description = msgspec.msgpack.decode(welcome.memory, type=_Description)
            self._remote_name = agent.api.add_remote_agent(description.agent_metadata)
            local = ("NIXL_INIT_AGENT", agent.blocks.data_ptr(), agent.blocks.shape[0], agent.device_id)
            remote = (self._remote_name, description.address, welcome.num_blocks, description.device_id)
            self._local: Any = agent.list_blocks(*local)
            self._remote: Any = agent.list_blocks(*remote)
        except Exception as error:
            self.close()
            raise TransferError(f"NIXL cannot reach its memory: {error}") from error

    def read(self, local: Sequence[int], remote: Sequence[int], stop: Callable[[], bool]) -> bool:
        with self._lock:
            if self._broken:
                raise TransferError("another read from it failed")
            self._num_readers += 1
        try:
            at_a_time = max(1, _BYTES_AT_A_TIME // self._agent.blocks.shape[1])
            for start in range(0, len(local), at_a_time):
                if stop():
                    return False
                end = start + at_a_time
                failure = self._read(np.array(local[start:end], np.int32), np.array(remote[start:end], np.int32), stop)
                if failure is not None:
                    self._broken = True
                    raise TransferError(failure)
            return not stop()
        finally:
            self._leave()

    def _read(
        self, local: npt.NDArray[np.int32], remote: npt.NDArray[np.int32], stop: Callable[[], bool]
    ) -> str | None:
        """Read some blocks. Return None if they are here, otherwise why not; then the agent can't be used any more.

        This doesn't raise: the traceback would refer to the agent, which has to be destroyed.
        """
        api = self._agent.api
        begun = time.monotonic()
        give_up: float | None = None
        try:
            handle = api.make_prepped_xfer("READ", self._local, local, self._remote, remote, b"", [BACKEND])
            state = api.transfer(handle)
            while state == "PROC":
                now = time.monotonic()
                time.sleep(min(max((now - begun) / 10, _SHORTEST_SLEEP_SECONDS), _LONGEST_SLEEP_SECONDS))
                state = api.check_xfer_state(handle)
                if give_up is None and stop():
                    give_up = now + _PATIENCE_SECONDS
                if self._broken or (give_up is not None and now > give_up):
                    return "NIXL's read did not end"
            return None if state == "DONE" else "NIXL's read failed"
        except Exception as error:  # the library's errors have no common base
            return f"NIXL cannot read its memory: {error}"

    def _leave(self) -> None:
        """End a read. The last reader of a broken agent destroys it; the others wait, so that nothing is written later."""
        with self._lock:
            self._num_readers -= 1
            if self._broken and not self._num_readers:
                self.close()
        if self._broken:
            self._closed.wait()

    def close(self) -> None:
        self._local = self._remote = None
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
