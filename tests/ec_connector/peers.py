"""Encoders and language models that exchange embeddings from memory to memory, as their engines would drive them."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import threading
from collections.abc import Collection
from typing import Any

import torch

from chiasm.ec_transfer import (
    ECConnector,
    ECConnectorFactory,
    ECConnectorMetadata,
    ECConnectorRole,
    ECTransferConfig,
    ECTransferRole,
)
from chiasm.ec_transfer.intake import Stage
from chiasm.ec_transfer.peers import LandingConnector, PeerConnector
from chiasm.ec_transfer.sources import MappedSource
from chiasm.transfer.memory_file import MemoryFile
from chiasm.wire import ECPlace

from .instance import Item, Request, embedding_of, identifier_of

CONNECTORS = ("SharedMemoryConnector", "TcpConnector", "NixlConnector")
PATIENCE_SECONDS = 30.0
MEMORY = "memfd:chiasm-e"
"""How the names of memory files for embeddings begin."""


def memory_open(pid: int) -> int:
    """Return how many descriptors of memory for embeddings a process has. Each holds its memory or a lock on some."""
    found = 0
    for descriptor in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # it was closed just now
            found += MEMORY in os.readlink(f"/proc/{pid}/fd/{descriptor}")
    return found


def memory_mapped(pid: int) -> int:
    """Return how many mappings of such memory it has."""
    with open(f"/proc/{pid}/maps") as maps:
        return sum(MEMORY in line for line in maps)


def keeps_nothing(scheduler: ECConnector) -> bool:
    """Whether a consumer lends nothing any more, of its own memory and of encoders'.

    That takes a moment: the thread that has brought something lets it go after it has woken the engine.
    """
    gc.collect()
    assert isinstance(scheduler, PeerConnector)
    if isinstance(scheduler, LandingConnector):
        lent = [scheduler._landing._lent]
    else:
        assert scheduler._reader is not None
        sources = [holder.source for holder in list(scheduler._reader._holders.values())]
        lent = [source._lent for source in sources if isinstance(source, MappedSource)]
    return not any(one.is_used or one._bytes for one in lent)


class Peer:
    """Both halves of one instance's connector. With ``separate_processes=True`` they don't know each other."""

    def __init__(self, connector: str, role: ECTransferRole, **changes: Any) -> None:
        settings: dict[str, Any] = {"fingerprint": "5eed", "max_bytes": 8 << 20, "receive_bytes": 4 << 20} | changes
        address: dict[str, Any] = {name: settings.pop(name) for name in ("host", "port") if name in settings}
        config = ECTransferConfig(connector=connector, role=role, connector_extra_config=address, **settings)
        self.scheduler = ECConnectorFactory.create_connector(config, ECConnectorRole.SCHEDULER)
        self.worker = ECConnectorFactory.create_connector(config, ECConnectorRole.WORKER)
        if not config.separate_processes:
            self.scheduler.meet(self.worker)
            self.worker.meet(self.scheduler)
        self.memory: dict[str, torch.Tensor] = {}
        self._woken = threading.Condition()
        self._wakes = 0
        self.scheduler.set_wake(self._wake)

    def sent(self, metadata: ECConnectorMetadata) -> ECConnectorMetadata:
        """The metadata as the worker gets it."""
        if not self.worker.config.separate_processes:
            return metadata
        received = pickle.loads(pickle.dumps(metadata))
        assert isinstance(received, ECConnectorMetadata)
        return received

    def _wake(self, arrived: str = "", /) -> None:
        with self._woken:
            self._wakes += 1
            self._woken.notify_all()

    def close(self) -> None:
        self.memory.clear()
        self.scheduler.shutdown()
        self.worker.shutdown()


class Encoder(Peer):
    def __init__(self, connector: str, **changes: Any) -> None:
        super().__init__(connector, ECTransferRole.PRODUCER, **changes)
        self.worker.bind_connector_metadata(self.sent(self.scheduler.build_connector_meta()))

    @property
    def holding(self) -> ECConnector:
        """The half that has the memory."""
        return self.scheduler if self.scheduler.config.separate_processes else self.worker

    @property
    def place(self) -> ECPlace:
        place = self.holding.place()
        assert place is not None
        return place

    @property
    def memory_file(self) -> MemoryFile:
        """Where the embeddings are that it has published."""
        assert isinstance(self.holding, PeerConnector)
        assert self.holding._holder is not None
        return self.holding._holder._arena.file

    def encode(self, name: object, embedding: torch.Tensor | None = None) -> str:
        """Make and publish an embedding, and return its identifier."""
        identifier = identifier_of(name)
        self.worker.save_caches({identifier: embedding_of(name) if embedding is None else embedding}, identifier)
        return identifier


class LanguageModel(Peer):
    def __init__(self, connector: str, **changes: Any) -> None:
        super().__init__(connector, ECTransferRole.CONSUMER, **changes)

    def admit(self, request_id: str, *names: object, rows: int = 4, num_computed_tokens: int = 0) -> Request:
        """A request comes that wants the embeddings of these names."""
        items = tuple(Item(identifier_of(name), index * rows, rows) for index, name in enumerate(names))
        request = Request(items, request_id)
        self.scheduler.ensure_cache_available(request, num_computed_tokens)
        return request

    def step(self, *requests: Request) -> None:
        """Take what is ready, as an engine's step does."""
        for request in requests:
            for index, item in enumerate(request.items):
                if item.identifier not in self.memory and self.scheduler.has_cache_item(item.identifier):
                    self.scheduler.update_state_after_alloc(request, index)
        metadata = self.scheduler.build_connector_meta()  # lives until the worker has loaded
        self.worker.bind_connector_metadata(self.sent(metadata))
        self.worker.start_load_caches(self.memory)
        self.worker.clear_connector_metadata()

    def load(self, *requests: Request) -> None:
        """Step until everything is in memory."""
        self.until(lambda: self._has_all(requests), *requests)

    def lose(self, *requests: Request) -> None:
        """Step until something of these requests is not in memory, and every place where it was expected was given up.

        That is more than ``is_coming`` says, which is false as long as a place has not answered.
        """
        self.until(lambda: not all(map(self._is_expected, self._missing(requests))), *requests)

    def until(self, condition: Any, *requests: Request) -> None:
        """Step after every wake until ``condition`` holds."""
        while True:
            with self._woken:
                seen = self._wakes
            self.step(*requests)
            if condition():
                return
            with self._woken:
                assert self._woken.wait_for(lambda: self._wakes > seen, PATIENCE_SECONDS), "nothing woke the engine"  # noqa: B023

    def next_wake(self, *requests: Request, seconds: float = 0.05) -> None:
        """Step once, and wait for a wake, but not for long."""
        with self._woken:
            seen = self._wakes
        self.step(*requests)
        with self._woken:
            self._woken.wait_for(lambda: self._wakes > seen, seconds)

    def finish(self, request: Request) -> None:
        for item in request.items:
            self.memory.pop(item.identifier, None)
        self.scheduler.request_finished(request)

    @property
    def holders(self) -> Collection[ECPlace]:
        """The encoders that it has met or is meeting."""
        assert isinstance(self.scheduler, PeerConnector)
        assert self.scheduler._reader is not None
        return self.scheduler._reader._holders.keys()

    def _is_expected(self, item: Item) -> bool:
        assert isinstance(self.scheduler, PeerConnector)
        assert self.scheduler._reader is not None
        with self.scheduler._reader._lock:
            wanted = self.scheduler._reader._table._intake.get(item.identifier)
            return wanted is not None and (wanted.stage is not Stage.WAITING or bool(wanted.places))

    def _missing(self, requests: tuple[Request, ...]) -> list[Item]:
        return [item for request in requests for item in request.items if item.identifier not in self.memory]

    def _has_all(self, requests: tuple[Request, ...]) -> bool:
        return not self._missing(requests)
