"""The base of connectors that move embeddings from an encoder's memory to a language model's: everything but the data plane.

A producer's worker role has a :class:`Holder`, a consumer's scheduler role a :class:`Reader`. If both halves of an instance are
in one process, they know each other: a producer's scheduler role asks its worker role what is published.
"""

from __future__ import annotations

import secrets
from abc import abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
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
from chiasm.ec_transfer.reader import Reader
from chiasm.ec_transfer.sources import Arrived, Landing, LandingSource, Source
from chiasm.ec_transfer.wake import Wake
from chiasm.ec_transfer.wants import Wish
from chiasm.errors import ConfigurationError
from chiasm.transfer.arena import Arena
from chiasm.transfer.greeting import Terms
from chiasm.transfer.memory import DataPlane, Memory, Peer
from chiasm.wire import ECPlace

_WARM_BYTES = 128 << 20
"""What a holder touches ahead of its use, since the first touch of memory takes several times as long as a copy into it."""


@dataclass(frozen=True)
class PeerMetadata(ECConnectorMetadata):
    """What one step loads, with the embeddings themselves."""

    arrived: dict[str, Arrived] = field(default_factory=dict, repr=False, compare=False)


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
        if config.separate_processes:
            raise ConfigurationError(
                f"{config.connector} needs both of its halves in one process, as vLLM has them with its UniProcExecutor on one "
                "device; use SharedStorageConnector elsewhere."
            )
        self._address = self.read_extra_config(PeerConfig)
        self.engine_id = secrets.token_hex(16)
        self._other: PeerConnector | None = None
        self._holder: Holder | None = None
        self._reader: Reader | None = None
        self._noted: dict[str, Arrived] = {}
        self._in_use: WeakValueDictionary[str, torch.Tensor] = WeakValueDictionary()
        """Embeddings that the engine took and that something still uses."""
        terms = Terms(
            PROTOCOL,
            PROTOCOL_VERSION,
            {"connector": config.connector, "fingerprint": config.fingerprint},
            config.fleet_key,
        )
        if role is ECConnectorRole.WORKER and self.is_producer:
            self._holder = self._hold(terms)
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
        if self._holder is not None:
            self._holder.close()
        self._reader = self._holder = None
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
                is_needed=item.offset + item.length > num_computed_tokens and item.identifier not in self._in_use,
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
        if (
            tensor := self._in_use.get(identifier)
        ) is not None:  # the engine has given it up, and something still uses it
            self._reader.bring_back(identifier, Arrived(tensor, 0.0))
        return self._reader.ask(identifier)

    def layout_of(self, identifier: str) -> tuple[tuple[int, ...], torch.dtype] | None:
        ready = None if self._reader is None else self._reader.ready(check_identifier(identifier))
        return None if ready is None else (tuple(ready.tensor.shape), ready.tensor.dtype)

    def is_published(self, identifier: str) -> bool:
        check_identifier(identifier)
        holder = self._other._holder if self._other is not None else None
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
            self._in_use[identifier] = arrived.tensor

    def build_connector_meta(self) -> ECConnectorMetadata:
        noted, self._noted = self._noted, {}
        if self._reader is not None:
            self._reader.end_round()
        return PeerMetadata(tuple(noted), noted)

    def request_finished(self, request: RequestLike) -> None:
        if self._reader is not None:
            self._reader.finish(request.request_id, [item.identifier for item in request.items])

    # ---- worker role --------------------------------------------------------------------------------------------------

    def place(self) -> ECPlace | None:
        return None if self._holder is None else self._holder.place

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor]) -> None:
        if self._metadata is None or not self.is_consumer:
            return
        arrived = self._metadata.arrived if isinstance(self._metadata, PeerMetadata) else {}
        for identifier in self._metadata.loads:
            if identifier in encoder_cache:
                continue
            entry = arrived.get(identifier)
            if entry is None:
                self.stats.load_failures += 1
                continue
            encoder_cache[identifier] = take_over(entry.tensor)
            self.stats.loads += 1
            self.stats.loaded_bytes += entry.tensor.nbytes
            self.stats.load_seconds += entry.seconds

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
        if self._reader is not None:
            self._reader.reject(identifier, reason)

    def save_caches(self, encoder_cache: dict[str, torch.Tensor], mm_hash: str) -> None:
        check_identifier(mm_hash)
        if self._holder is None:
            return
        self._holder.publish(mm_hash, encoder_cache[mm_hash])


class LandingConnector(PeerConnector):
    """The base of connectors whose consumers copy embeddings into an arena of their own."""

    _plane: DataPlane
    _landing: Landing

    def prepare(self) -> None:
        self._plane = self.make_plane()
        self._landing = Landing(self.config.receive_bytes, self.config.device, self.memory_freed)
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
