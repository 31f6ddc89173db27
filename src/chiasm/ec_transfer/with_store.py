"""A connector together with a store, the second place where embeddings are looked for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch

from chiasm.ec_transfer.base import (
    ECConnector,
    ECConnectorMetadata,
    ECConnectorRole,
    ECTransferConfig,
    RequestLike,
)
from chiasm.ec_transfer.device import take_over, to_device
from chiasm.ec_transfer.entry_file import EntryHeader, bytes_of, dtype_of, header_of
from chiasm.ec_transfer.pins import EntryMemory, PinnedMetadata
from chiasm.ec_transfer.stores import CorruptEntryError, StoredEntry, open_store
from chiasm.ec_transfer.stores.reader import Reader, StoreReads
from chiasm.ec_transfer.stores.recovery import Recovery
from chiasm.ec_transfer.stores.writer import StoreWrites, Writer
from chiasm.ec_transfer.wake import Wake
from chiasm.errors import ConfigurationError
from chiasm.wire import ECPlace


@dataclass(frozen=True)
class WithStoreMetadata(PinnedMetadata[EntryMemory]):
    """What one step loads: from the store, and what the connector itself says."""

    inner: ECConnectorMetadata = field(default_factory=ECConnectorMetadata)


class WithStore(ECConnector):
    """Passes all calls on to ``connector``; a producer also writes to the store, and a consumer also reads from it.

    An entry is read from the store if the proxy has said that it is there, a request wants it, and neither the scheduler nor
    the connector has it. If it can't be read, it is as if the store had never had it: the proxy has the item encoded.
    """

    def __init__(self, config: ECTransferConfig, role: ECConnectorRole, connector: ECConnector) -> None:
        super().__init__(config, role)
        if min(config.store_read_bytes, config.store_queue_bytes) <= 0:
            raise ConfigurationError("--ec-store-read-bytes and --ec-store-queue-bytes must be positive.")
        self._connector = connector
        self.stats = connector.stats
        self._store = open_store(config.store)
        self._noted: dict[str, EntryMemory] = {}
        self._reader: Reader[EntryMemory] | None = None
        self._writer: Writer | None = None
        self._recovery: Recovery | None = None
        if role is ECConnectorRole.SCHEDULER and self.is_consumer:
            self._reader = Reader(
                self._store,
                config.fingerprint,
                max_bytes=config.store_read_bytes,
                check=self._check,
                allocate=lambda entry: EntryMemory(
                    _header_of(entry), config.device, is_shared=config.separate_processes
                ),
                is_elsewhere=connector.is_coming,
            )
        if role is ECConnectorRole.WORKER and self.is_producer:
            self._writer = Writer(self._store, config.store_queue_bytes)
            self._recovery = Recovery(self._store, config.fingerprint)

    def meet(self, other: ECConnector) -> None:
        assert isinstance(other, WithStore)
        self._connector.meet(other._connector)
        self.stats = self._connector.stats

    @property
    def store_stats(self) -> StoreReads | StoreWrites | None:
        worker = self._reader or self._writer
        return worker.stats if worker is not None else None

    def shutdown(self) -> None:
        if self._reader is not None:
            self._reader.stop()
        if self._writer is not None:
            self._writer.stop()
        if self._recovery is not None:
            self._recovery.stop()
        self._store.close()
        self._connector.shutdown()

    def store_id(self) -> str:
        return self._connector.store_id()

    @property
    def max_entry_bytes(self) -> int:
        return self._connector.max_entry_bytes

    @property
    def max_received_bytes(self) -> int | None:
        limit = self._connector.max_received_bytes
        return None if limit is None else max(limit, self.config.store_read_bytes)

    def free_bytes(self) -> int | None:
        return self._connector.free_bytes()

    def num_unfetched(self) -> int:
        is_writing = self._writer is not None and self._writer.stats.queued_bytes > 0
        return self._connector.num_unfetched() + is_writing

    # ---- scheduler role -------------------------------------------------------------------------------------------

    def set_wake(self, wake: Wake) -> None:
        if self._reader is not None:
            self._reader.wake = wake
        self._connector.set_wake(wake)

    def expect(self, places: Mapping[str, ECPlace], stored: Collection[str] = ()) -> None:
        self._connector.expect(places, stored)
        if self._reader is not None:
            self._reader.tell(stored, elsewhere=places)

    def _check(self, entry: StoredEntry, max_rows: int) -> None:
        dtype = str(dtype_of(_header_of(entry))).removeprefix("torch.")
        width = self.config.entry_width
        if (
            len(entry.shape) != 2
            or entry.shape[0] > max_rows
            or (width and entry.shape[1] != width)
            or (self.config.dtype and dtype != self.config.dtype)
        ):
            raise CorruptEntryError(
                f"it has the shape {entry.shape} and the dtype {dtype}, but a request needs at most {max_rows} rows of {width} "
                f"columns in {self.config.dtype}"
            )

    def has_cache_item(self, identifier: str) -> bool:
        return self._connector.has_cache_item(identifier) or (self._reader is not None and self._reader.ask(identifier))

    def layout_of(self, identifier: str) -> tuple[tuple[int, ...], torch.dtype] | None:
        known = self._connector.layout_of(identifier)
        if known is not None or self._reader is None:
            return known
        landing = self._reader.ready(identifier)
        return None if landing is None else (tuple(landing.tensor.shape), landing.tensor.dtype)

    def is_published(self, identifier: str) -> bool:
        return self._connector.is_published(identifier)

    def is_coming(self, identifier: str) -> bool:
        is_read = self._reader is not None and self._reader.is_coming(identifier)
        return is_read or self._connector.is_coming(identifier)

    def ensure_cache_available(self, request: RequestLike, num_computed_tokens: int) -> bool:
        if self._reader is not None:
            for item in request.items:
                self._reader.want(request.request_id, item.identifier, item.length)
        return self._connector.ensure_cache_available(request, num_computed_tokens)

    def update_state_after_alloc(self, request: RequestLike, index: int) -> None:
        identifier = request.items[index].identifier
        landing = self._reader.take(identifier) if self._reader is not None else None
        if landing is not None:
            self._noted[identifier] = landing
        elif identifier not in self._noted:
            self._connector.update_state_after_alloc(request, index)

    def build_connector_meta(self) -> ECConnectorMetadata:
        inner = self._connector.build_connector_meta()
        if self._reader is None:
            return inner
        self._reader.end_round()
        if not self._noted:
            return WithStoreMetadata(inner.loads, inner=inner)
        held, self._noted = self._noted, {}
        pins = {name: pin for name, landing in held.items() if (pin := landing.pin()) is not None}
        return WithStoreMetadata((*held, *inner.loads), held, pins, inner)

    def request_finished(self, request: RequestLike) -> None:
        self._connector.request_finished(request)
        if self._reader is not None:
            self._reader.finish(request.request_id, [item.identifier for item in request.items])

    # ---- worker role ----------------------------------------------------------------------------------------------

    def place(self) -> ECPlace | None:
        return self._connector.place()

    def bind_connector_metadata(self, metadata: ECConnectorMetadata) -> None:
        super().bind_connector_metadata(metadata)
        inner = metadata.inner if isinstance(metadata, WithStoreMetadata) else metadata
        self._connector.bind_connector_metadata(inner)

    def clear_connector_metadata(self) -> None:
        super().clear_connector_metadata()
        self._connector.clear_connector_metadata()

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor]) -> None:
        if isinstance(self._metadata, WithStoreMetadata):
            for identifier in self._metadata.loads:
                if identifier in encoder_cache:
                    continue
                if (landing := self._metadata.held.get(identifier)) is not None:
                    encoder_cache[identifier] = take_over(to_device(landing.tensor, self.config.device))
                elif (tensor := self._metadata.load_pinned(identifier, self.config.device)) is not None:
                    encoder_cache[identifier] = tensor
        self._connector.start_load_caches(encoder_cache)

    def discard(self, identifier: str, reason: str) -> None:
        if self._reader is not None:
            self._reader.discard(identifier)
        self._connector.discard(identifier, reason)

    def restore(self, identifier: str, rows: int) -> bool:
        if self._recovery is None or self._writer is None or not self._recovery.was_made(identifier):
            return False

        def check(entry: StoredEntry) -> None:
            self._check(entry, rows)
            if entry.shape[0] != rows:
                raise CorruptEntryError(f"it has {entry.shape[0]} rows, but the image makes {rows}")

        landing = self._recovery.read(identifier, check, lambda entry: EntryMemory(_header_of(entry), is_shared=False))
        if landing is not None:
            self._connector.save_caches({identifier: landing.tensor}, identifier)
        self._writer.note_restored(landing is not None)
        return landing is not None

    def save_caches(self, encoder_cache: dict[str, torch.Tensor], mm_hash: str) -> None:
        self._connector.save_caches(encoder_cache, mm_hash)
        if self._writer is None or self._recovery is None:
            return
        self._recovery.note(mm_hash)
        tensor = encoder_cache[mm_hash]

        def make() -> tuple[StoredEntry, memoryview]:
            header = header_of(mm_hash, self.config.fingerprint, tensor)
            data = bytes_of(tensor)
            return StoredEntry.of(mm_hash, self.config.fingerprint, header.dtype, header.shape, data), data

        self._writer.offer(mm_hash, tensor.nbytes, make)


def _header_of(entry: StoredEntry) -> EntryHeader:
    return EntryHeader(entry.identifier, entry.fingerprint, entry.dtype, entry.shape)
