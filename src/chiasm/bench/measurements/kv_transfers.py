"""How long KV blocks take from one process to another, beside the time that the machine needs for the bytes alone."""

from __future__ import annotations

import ctypes
import multiprocessing
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import torch

from chiasm.bench.load import alternate
from chiasm.errors import KVUnavailableError
from chiasm.kv_transfer.base import (
    FinishedTransfers,
    KVConnector,
    KVConnectorFactory,
    KVConnectorRole,
    KVLayout,
    KVTransferConfig,
    KVTransferRole,
)
from chiasm.transfer.memory import Memory
from chiasm.wire import KVTransferParams

_ENGINE_ID = "transfer-benchmark"
_PATIENCE_SECONDS = 120.0
_VALUES = 251  # number of different bytes with which the producer's blocks are filled


@dataclass(frozen=True)
class TransferResult:
    """Medians in seconds for ``size_bytes`` in scattered blocks of ``block_bytes``; ``measure_transfers`` says what each is."""

    connector: str
    size_bytes: int
    block_bytes: int
    transfer_seconds: float
    copy_seconds: float
    memcpy_seconds: float
    bare_nixl_seconds: float | None

    @property
    def memcpy_ratio(self) -> float:
        """Speed of the connector's copy as a fraction of that of one memcpy."""
        return self.memcpy_seconds / self.copy_seconds

    @property
    def bare_nixl_ratio(self) -> float | None:
        """Speed of the connector's copy as a fraction of that of NIXL alone; None for other connectors."""
        return None if self.bare_nixl_seconds is None else self.bare_nixl_seconds / self.copy_seconds


@dataclass(frozen=True)
class _Request:
    request_id: str
    kv_transfer_params: KVTransferParams | None = None
    num_choices: int = 1
    deadline: float = float("inf")


class _Blocks(NamedTuple):
    local: list[int]
    remote: list[int]


def measure_transfers(
    connector: str, sizes_bytes: Sequence[int], block_bytes: int, repeats: int
) -> list[TransferResult]:
    """Measure transfers on the CPU, from a producer process that is started for it to this process.

    - A *transfer* begins when the request arrives here, with blocks allocated for it, and ends when its load is reported.
      It consists of the claim, the copy, and the producer's confirmation that the copy is whole.
    - The *copy* is the part of the transfer in which bytes move.
    - The *memcpy* copies as many bytes in one piece within this process.
    - *Bare NIXL*, for NixlConnector only, is one NIXL read of as many blocks by an agent that does nothing else and is
      polled without pause.

    They take turns ``repeats`` times, each with other blocks of two caches that are as large as the largest size. All memory
    has been touched before. Sizes are rounded down to whole blocks, at least one. Raises ConfigurationError if the connector
    can't be used here.
    """
    counts = [max(1, size // block_bytes) for size in sizes_bytes]
    layout = KVLayout(1, 1, 1, block_bytes, "uint8", block_bytes)
    num_blocks = max(counts)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    consumer = _Instance(_config(connector, KVTransferRole.CONSUMER), layout, num_blocks)
    producer = context.Process(target=_produce, args=(theirs, connector, layout, num_blocks), daemon=True)
    try:
        producer.start()
        theirs.close()
        pair = _Pair(consumer, ours)
        pair.transfer(_Blocks(list(range(num_blocks)), list(range(num_blocks))))
        return [_measure(pair, connector, count, repeats) for count in counts]
    finally:
        producer.kill()
        producer.join()
        ours.close()
        consumer.shutdown()


def _measure(pair: _Pair, connector: str, count: int, repeats: int) -> TransferResult:
    actions: list[Callable[[], tuple[float, ...]]] = [
        lambda: (pair.memcpy(count),),
        lambda: pair.transfer(pair.choose(count)),
    ]
    if connector == "NixlConnector":
        actions.append(lambda: (pair.read_with_nixl(pair.choose(count)),))
    memcpy, transfer, copy, *bare = alternate(actions, repeats)
    return TransferResult(
        connector=connector,
        size_bytes=count * pair.block_bytes,
        block_bytes=pair.block_bytes,
        transfer_seconds=transfer,
        copy_seconds=copy,
        memcpy_seconds=memcpy,
        bare_nixl_seconds=bare[0] if bare else None,
    )


class _Instance:
    """Both halves of a connector, and a KV cache."""

    def __init__(self, config: KVTransferConfig, layout: KVLayout, num_blocks: int) -> None:
        self.scheduler: KVConnector = KVConnectorFactory.create_connector(config, KVConnectorRole.SCHEDULER)
        self.worker: KVConnector = KVConnectorFactory.create_connector(config, KVConnectorRole.WORKER)
        num_bytes = num_blocks * layout.bytes_per_block
        memory = self.worker.allocate_kv_cache(num_bytes)
        if memory is None:
            memory = torch.empty(num_bytes, dtype=torch.uint8)
        self.blocks = memory.view(num_blocks, layout.bytes_per_block)
        self.blocks.copy_((torch.arange(num_blocks) % _VALUES).to(torch.uint8)[:, None])
        self._news = threading.Event()
        self.worker.register_kv_caches(self.blocks, layout, self._news.set)
        self.scheduler.set_xfer_handshake_metadata(self.worker.get_handshake_metadata())

    def step(self) -> None:
        """Start what the scheduler half has planned."""
        metadata = self.scheduler.build_connector_meta()
        if metadata:
            self.worker.start_load_kv(metadata)

    def wait(self) -> FinishedTransfers:
        """Return what finishes next. Raises KVUnavailableError after a long wait."""
        while True:
            self._news.clear()
            finished = self.worker.get_finished()
            if finished != FinishedTransfers():
                return finished
            if not self._news.wait(_PATIENCE_SECONDS):
                raise KVUnavailableError(f"Nothing was transferred within {_PATIENCE_SECONDS:g} seconds.")

    def shutdown(self) -> None:
        self.scheduler.shutdown()
        self.worker.shutdown()


class _Pair:
    """The consumer here, the producer behind a pipe, and memory for the comparisons."""

    def __init__(self, consumer: _Instance, producer: Connection) -> None:
        self._consumer = consumer
        self._producer = producer
        self._choose = random.Random(0)
        self._num_requests = 0
        self._source = torch.ones_like(consumer.blocks)
        self._nixl: _BareNixl | None = None
        self.block_bytes: int = consumer.blocks.shape[1]

    def choose(self, count: int) -> _Blocks:
        """Return random blocks of both caches, in random order."""
        blocks = range(len(self._consumer.blocks))
        return _Blocks(self._choose.sample(blocks, count), self._choose.sample(blocks, count))

    def transfer(self, blocks: _Blocks) -> tuple[float, float]:
        """Return the seconds of a transfer, and of the copy in it. Raises KVUnavailableError if it fails."""
        self._num_requests += 1
        handle = self._ask("offer", str(self._num_requests), blocks.remote)
        consumer = self._consumer
        request = _Request(str(self._num_requests), handle)
        copied_before = consumer.worker.stats.transfer_seconds
        started = time.perf_counter()
        consumer.scheduler.claim(request)
        consumer.scheduler.update_state_after_alloc(request, 0, list(zip(*blocks, strict=True)))
        consumer.step()
        finished = consumer.wait()
        seconds = time.perf_counter() - started
        for reason in finished.failed.values():
            raise KVUnavailableError(reason)
        consumer.scheduler.drop(request)
        consumer.step()
        self._check(blocks)
        return seconds, consumer.worker.stats.transfer_seconds - copied_before

    def memcpy(self, count: int) -> float:
        """Return the seconds of one copy of as many bytes as ``count`` blocks have."""
        room = len(self._source) - count
        target = self._consumer.blocks[self._choose.randint(0, room) :].data_ptr()
        source = self._source[self._choose.randint(0, room) :].data_ptr()
        started = time.perf_counter()
        ctypes.memmove(target, source, count * self.block_bytes)
        return time.perf_counter() - started

    def read_with_nixl(self, blocks: _Blocks) -> float:
        """Return the seconds of a NIXL read without the connector."""
        if self._nixl is None:
            self._nixl = _BareNixl(self._consumer.blocks, *self._ask("describe"))
        self._producer.send(("drive", ()))
        seconds = self._nixl.read(blocks)
        self._producer.send(("rest", ()))
        self._receive()
        self._check(blocks)
        return seconds

    def _check(self, blocks: _Blocks) -> None:
        got = self._consumer.blocks[torch.tensor(blocks.local)][:, [0, -1]]
        expected = (torch.tensor(blocks.remote) % _VALUES).to(torch.uint8)[:, None]
        if not bool((got == expected).all()):
            raise KVUnavailableError("The transferred blocks differ from those of the producer.")

    def _ask(self, what: str, *arguments: object) -> Any:
        self._producer.send((what, arguments))
        return self._receive()

    def _receive(self) -> Any:
        if not self._producer.poll(_PATIENCE_SECONDS):
            raise KVUnavailableError("The producer's process does not answer.")
        return self._producer.recv()


class _BareNixl:
    """A NIXL agent that does nothing but read from another."""

    def __init__(self, blocks: torch.Tensor, agent_metadata: bytes, address: int, num_blocks: int) -> None:
        from chiasm.transfer.nixl import Agent, import_nixl

        self._agent = Agent(import_nixl(), "bare-consumer", _memory_of(blocks))
        name = self._agent.api.add_remote_agent(agent_metadata)
        self._local = self._list("NIXL_INIT_AGENT", blocks.data_ptr(), len(blocks), blocks.shape[1])
        self._remote = self._list(name, address, num_blocks, blocks.shape[1])

    def _list(self, agent_name: str, address: int, num_blocks: int, block_bytes: int) -> Any:
        """Prepare the list of an agent's blocks, which are contiguous from ``address`` on."""
        blocks = [(address + block * block_bytes, block_bytes, 0) for block in range(num_blocks)]
        return self._agent.api.prep_xfer_dlist(agent_name, np.array(blocks, np.uint64), self._agent.kind)

    def read(self, blocks: _Blocks) -> float:
        api = self._agent.api
        local, remote = np.array(blocks.local, np.int32), np.array(blocks.remote, np.int32)
        started = time.perf_counter()
        handle = api.make_prepped_xfer("READ", self._local, local, self._remote, remote)
        state = api.transfer(handle)
        while state == "PROC":
            state = api.check_xfer_state(handle)
        seconds = time.perf_counter() - started
        handle.release()
        if state != "DONE":
            raise KVUnavailableError("A bare NIXL read failed.")
        return seconds


def _produce(pipe: Connection, connector: str, layout: KVLayout, num_blocks: int) -> None:
    """Run the producer's process: do what ``pipe`` asks for until the process is killed."""
    producer = _Instance(_config(connector, KVTransferRole.PRODUCER), layout, num_blocks)
    agent: Any = None
    is_driven = False
    while True:
        while is_driven and not pipe.poll():
            agent.api.get_new_notifs()
        what, arguments = pipe.recv()
        if what == "offer":
            request_id, block_ids = arguments
            handle = producer.scheduler.leave(_Request(request_id), block_ids)
            producer.step()
            producer.worker.get_finished()
            pipe.send(handle)
        elif what == "describe":
            from chiasm.transfer.nixl import Agent, import_nixl

            agent = Agent(import_nixl(), "bare-producer", _memory_of(producer.blocks))
            pipe.send((agent.api.get_agent_metadata(), producer.blocks.data_ptr(), num_blocks))
        else:
            is_driven = what == "drive"
            if not is_driven:
                pipe.send(None)


def _config(connector: str, role: KVTransferRole) -> KVTransferConfig:
    return KVTransferConfig(connector=connector, role=role, engine_id=_ENGINE_ID, lease_seconds=_PATIENCE_SECONDS)


def _memory_of(blocks: torch.Tensor) -> Memory:
    return Memory(blocks.data_ptr(), blocks.nbytes, owner=blocks)
