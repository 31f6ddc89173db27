"""The base of connectors that move embeddings from an encoder's memory to a language model's: everything but the data plane.

A consumer's scheduler role has a :class:`Reader`, and a producer's worker role a :class:`Holder`. If both halves of an instance
are in one process, they know each other: a producer's scheduler role asks its worker role what is published. Otherwise the
scheduler role has the holder, too. Workers, of which there may be several, then load what the reader has brought in by its pins
(``pins.py``), and the one that publishes writes to the holder's memory itself (``publishing.py``).
"""

from __future__ import annotations

import logging
import secrets
import time
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar
from weakref import WeakValueDictionary

import torch

from chiasm.ec_transfer.base import (
    ECConnector,
    ECConnectorMetadata,
    ECConnectorRole,
    ECTransferConfig,
    RequestLike,
    check_identifier,
)
from chiasm.ec_transfer.device import take_over
from chiasm.ec_transfer.extra_config import PeerConfig
from chiasm.ec_transfer.holder import Holder
from chiasm.ec_transfer.peer_messages import PROTOCOL, PROTOCOL_VERSION, Welcome
from chiasm.ec_transfer.pins import PinnedMetadata
from chiasm.ec_transfer.publishing import Publisher, PublishingAddress, PublishingPort
from chiasm.ec_transfer.reader import Reader
from chiasm.ec_transfer.sources import Arrived, Landing, LandingSource, Source
from chiasm.ec_transfer.wake import Wake
from chiasm.ec_transfer.wants import Wish
from chiasm.errors import ConfigurationError, StorageError
from chiasm.transfer.arena import Arena
from chiasm.transfer.greeting import Terms
from chiasm.transfer.memory import DataPlane, Memory, Peer
from chiasm.wire import ECPlace

_logger = logging.getLogger(__name__)
_WARM_BYTES = 128 << 20
"""What a holder touches ahead of its use, since the first touch of memory takes several times as long as a copy into it."""
_MAX_TAKEN = 1 << 12
"""How many embeddings that workers elsewhere got are remembered. The oldest are forgotten, and would be brought again."""


@dataclass(frozen=True)
class PeerMetadata(PinnedMetadata[Arrived]):
    """What one step loads, and where a producer's workers publish, if they are other processes."""

    publishing: PublishingAddress | None = None


class PeerConnector(ECConnector):
    """Moves embeddings between the memories of processes, which ``expect`` introduces to each other.

    A producer keeps what it publishes in ``config.max_bytes`` of memory, the least recently used are evicted, and listens
    where :class:`PeerConfig` says. At a consumer, at most ``config.receive_bytes`` are on their way or ready at the same
    time. Raises ConfigurationError for limits or an address that can't work.
    """

    has_checksums: ClassVar[bool] = True
    """Whether what is read is compared with what was published."""

    def __init__(self, config: ECTransferConfig, role: ECConnectorRole) -> None:
        super().__init__(config, role)
        self._address = self.read_extra_config(PeerConfig)
        self.engine_id = secrets.token_hex(16)
        self._other: PeerConnector | None = None
        self._holder: Holder | None = None
        self._port: PublishingPort | None = None
        self._publisher: Publisher | None = None
        """Of a worker that is another process, once a step has said where it publishes."""
        self._has_failed_to_save = False
        self._reader: Reader | None = None
        self._noted: dict[str, Arrived] = {}
        self._in_use: WeakValueDictionary[str, torch.Tensor] = WeakValueDictionary()
        """Embeddings that the engine took and that something in this process still uses."""
        self._taken: OrderedDict[str, None] = OrderedDict()
        """Embeddings that workers elsewhere got, of which the engine hasn't said since that it needs them."""
        terms = Terms(
            PROTOCOL,
            PROTOCOL_VERSION,
            {"connector": config.connector, "fingerprint": config.fingerprint},
            config.fleet_key,
        )
        holding = ECConnectorRole.SCHEDULER if config.separate_processes else ECConnectorRole.WORKER
        if role is holding and self.is_producer:
            self._holder = self._hold(terms)
            if config.separate_processes:
                self._port = PublishingPort(self._holder, config.fingerprint)
        if role is ECConnectorRole.SCHEDULER and self.is_consumer:
            self.prepare()
            row_bytes = (
                config.entry_width * getattr(torch, config.dtype).itemsize if config.dtype and config.entry_width else 0
            )
            self._reader = Reader(terms, config.receive_bytes, self.reach, self.stats, row_bytes=row_bytes)

    @abstractmethod
    def make_plane(self) -> DataPlane:
        """Return the data plane. Raises ConfigurationError if it can't work here. Called once."""

    def prepare(self) -> None:
        """Consumer: make what ``reach`` needs. Raises ConfigurationError if it can't be had. Called once."""
        return None

    @abstractmethod
    def reach(self, peer: Peer, welcome: Welcome) -> Source:
        """Consumer: reach the memory of a holder. Called on any thread. Raises TransferError."""

    def memory_freed(self) -> None:
        """Consumer: there is memory again. Called from any thread."""
        if self._reader is not None:
            self._reader.memory_freed()

    def meet(self, other: ECConnector) -> None:
        assert isinstance(other, PeerConnector)
        self._other = other
        if self._reader is not None:
            self._reader.stats = other.stats  # what both count is added up

    def shutdown(self) -> None:
        if self._reader is not None:
            self._reader.close()
        if self._port is not None:
            self._port.close()
        if self._holder is not None:
            self._holder.close()
        if self._publisher is not None:
            self._publisher.close()
        self._reader = self._port = self._holder = self._publisher = None
        self._noted.clear()
        self.clear_connector_metadata()

    def _hold(self, terms: Terms) -> Holder:
        arena = Arena(self.config.max_bytes, "chiasm-ec", warm_bytes=_WARM_BYTES)
        memory = self.make_plane().offer(Memory.of_file(arena.file))
        try:
            return Holder(
                self._address,
                self.config.fingerprint,
                self.engine_id,
                terms,
                arena,
                memory,
                self.stats,
                has_checksums=self.has_checksums,
            )
        except ConfigurationError:
            memory.close()
            arena.close()
            raise

    @property
    def max_entry_bytes(self) -> int:
        return self._holder.max_entry_bytes if self._holder is not None else super().max_entry_bytes

    @property
    def max_received_bytes(self) -> int:
        return self.config.receive_bytes

    def free_bytes(self) -> int | None:
        return None if self._holder is None else self._holder.free_bytes

    def num_unfetched(self) -> int:
        return 0 if self._holder is None else self._holder.num_unfetched()

    # ---- scheduler role -----------------------------------------------------------------------------------------------

    def set_wake(self, wake: Wake) -> None:
        if self._reader is not None:
            self._reader.wake = wake

    def expect(self, places: Mapping[str, ECPlace], stored: Collection[str] = ()) -> None:
        if self._reader is not None:
            self._reader.expect({check_identifier(name): place for name, place in places.items() if place})

    def ensure_cache_available(self, request: RequestLike, num_computed_tokens: int) -> bool:
        if self._reader is None:
            return super().ensure_cache_available(request, num_computed_tokens)
        wishes = [
            Wish(
                check_identifier(item.identifier),
                item.length,
                is_needed=item.offset + item.length > num_computed_tokens and not self._engine_has(item.identifier),
            )
            for item in request.items
        ]
        self._reader.want(request.request_id, wishes)
        return all(not wish.is_needed or self._reader.ready(wish.identifier) is not None for wish in wishes)

    def has_cache_item(self, identifier: str) -> bool:
        if self._reader is None:
            return self.is_published(identifier)
        check_identifier(identifier)
        if identifier in self._noted:
            return True
        self._taken.pop(identifier, None)
        tensor = self._in_use.get(identifier)
        if tensor is not None:  # the engine has given it up, and something still uses it
            self._reader.bring_back(identifier, Arrived(tensor, 0.0))
        return self._reader.ask(identifier)

    def _engine_has(self, identifier: str) -> bool:
        """Whether the engine still has an embedding that it took, as far as is known."""
        return identifier in self._in_use or identifier in self._taken

    def layout_of(self, identifier: str) -> tuple[tuple[int, ...], torch.dtype] | None:
        ready = None if self._reader is None else self._reader.ready(check_identifier(identifier))
        return None if ready is None else (tuple(ready.tensor.shape), ready.tensor.dtype)

    def is_published(self, identifier: str) -> bool:
        check_identifier(identifier)
        holder = self._other._holder if self._other is not None else self._holder
        return holder is not None and holder.has(identifier)

    def is_coming(self, identifier: str) -> bool:
        check_identifier(identifier)
        if self._reader is None:
            return self.has_cache_item(identifier)
        return self._reader.is_coming(identifier)

    def update_state_after_alloc(self, request: RequestLike, index: int) -> None:
        identifier = check_identifier(request.items[index].identifier)
        arrived = None if self._reader is None else self._reader.take(identifier)
        if arrived is not None:
            self._noted[identifier] = arrived
            if not self.config.separate_processes:
                self._in_use[identifier] = arrived.tensor
            else:
                self._taken[identifier] = None
                if len(self._taken) > _MAX_TAKEN:
                    self._taken.popitem(last=False)

    def build_connector_meta(self) -> ECConnectorMetadata:
        noted, self._noted = self._noted, {}
        if self._reader is not None:
            self._reader.end_round()
        pins = {identifier: arrived.pin for identifier, arrived in noted.items() if arrived.pin is not None}
        return PeerMetadata(tuple(noted), noted, pins, self._port.address if self._port is not None else None)

    def request_finished(self, request: RequestLike) -> None:
        if self._reader is not None:
            self._reader.finish(request.request_id, [item.identifier for item in request.items])

    # ---- worker role --------------------------------------------------------------------------------------------------

    def place(self) -> ECPlace | None:
        return None if self._holder is None else self._holder.place

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor]) -> None:
        if self._metadata is None or not self.is_consumer:
            return
        metadata = self._metadata if isinstance(self._metadata, PeerMetadata) else PeerMetadata()
        for identifier in self._metadata.loads:
            if identifier in encoder_cache:
                continue
            loaded = self._load(identifier, metadata)
            if loaded is None:
                self.stats.load_failures += 1
                continue
            encoder_cache[identifier] = loaded.tensor
            self.stats.loads += 1
            self.stats.loaded_bytes += loaded.tensor.nbytes
            self.stats.load_seconds += loaded.seconds

    def _load(self, identifier: str, metadata: PeerMetadata) -> Arrived | None:
        """Return an embedding of the step for use by this thread; None if it can't be had."""
        arrived = metadata.held.get(identifier)
        if arrived is not None:
            return arrived._replace(tensor=take_over(arrived.tensor))
        started = time.perf_counter()
        tensor = metadata.load_pinned(identifier, self.config.device)
        return None if tensor is None else Arrived(tensor, time.perf_counter() - started)

    def discard(self, identifier: str, reason: str) -> None:
        check_identifier(identifier)
        if self._holder is not None:
            self._holder.remove(identifier)
        elif self._reader is not None:
            self.reject(identifier, reason)
        elif self._other is not None:
            self._other.reject(identifier, reason)

    def reject(self, identifier: str, reason: str) -> None:
        """Scheduler role: what came is of no use. ``reason`` is for the log."""
        self._in_use.pop(identifier, None)
        self._taken.pop(identifier, None)
        if self._reader is not None:
            self._reader.reject(identifier, reason)

    def bind_connector_metadata(self, metadata: ECConnectorMetadata) -> None:
        super().bind_connector_metadata(metadata)
        if self._publisher is None and isinstance(metadata, PeerMetadata) and metadata.publishing is not None:
            self._publisher = Publisher(metadata.publishing, self.config.fingerprint)

    def save_caches(self, encoder_cache: dict[str, torch.Tensor], mm_hash: str) -> None:
        check_identifier(mm_hash)
        if not self.is_producer:
            return
        try:
            if self._holder is not None:
                self._holder.publish(mm_hash, encoder_cache[mm_hash])
            elif self._publisher is not None:
                self._publisher.publish(mm_hash, encoder_cache[mm_hash])
            else:
                raise StorageError("No step has said yet where embeddings are published.")
        except StorageError as error:
            self.stats.save_failures += 1
            if not self._has_failed_to_save:
                _logger.error("%s Further failures are only counted, until an embedding is published.", error.message)
            self._has_failed_to_save = True
            raise
        self._has_failed_to_save = False


class LandingConnector(PeerConnector):
    """The base of connectors whose consumers copy embeddings into an arena of their own."""

    _plane: DataPlane
    _landing: Landing

    def prepare(self) -> None:
        self._plane = self.make_plane()
        config = self.config
        self._landing = Landing(
            config.receive_bytes, config.device, self.memory_freed, is_shared=config.separate_processes
        )
        self._plane.prepare(self._memory)

    def reach(self, peer: Peer, welcome: Welcome) -> Source:
        return LandingSource(self._plane.reach(peer, welcome.memory, self._memory), self._landing)

    def shutdown(self) -> None:
        super().shutdown()
        if hasattr(self, "_landing"):
            self._landing.arena.close()

    @property
    def _memory(self) -> Memory:
        return Memory.of_file(self._landing.arena.file)
