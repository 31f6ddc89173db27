"""A connector together with a store, the second place where embeddings are looked for."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from chiasm.ec_transfer.base import (
    ECConnector,
    ECConnectorMetadata,
    ECConnectorRole,
    ECTransferConfig,
    RequestLike,
)
from chiasm.ec_transfer.device import take_over, to_device
from chiasm.ec_transfer.entry_file import EntryHeader, OpenFile, bytes_of, dtype_of, header_of
from chiasm.ec_transfer.stores import CorruptEntryError, StoredEntry, open_store
from chiasm.ec_transfer.stores.reader import Reader, StoreReads
from chiasm.ec_transfer.stores.recovery import Recovery
from chiasm.ec_transfer.stores.writer import StoreWrites, Writer
from chiasm.ec_transfer.wake import Wake
from chiasm.errors import ConfigurationError
from chiasm.wire import ECPlace

_log = logging.getLogger(__name__)


class StoredPin(NamedTuple):
    """Where another process of this machine finds an entry that this one has read."""

    process: int
    descriptor: int
    dtype: str
    shape: tuple[int, ...]

    def tensor(self) -> torch.Tensor:
        """Map the entry. Raises RuntimeError if the other process has dropped it."""
        path = f"/proc/{self.process}/fd/{self.descriptor}"
        return torch.from_file(path, shared=False, size=math.prod(self.shape), dtype=_dtype(self.dtype)).view(
            self.shape
        )


class Landing:
    """Memory of one entry: this process's own or, if ``is_shared``, a file without a name that others can map."""

    def __init__(self, entry: StoredEntry, device: str, *, is_shared: bool) -> None:
        self._entry = entry
        self._device = device
        self._file = OpenFile(os.memfd_create("chiasm-stored", os.MFD_CLOEXEC)) if is_shared else None
        if self._file is None:
            self._data = torch.empty(entry.size_bytes, dtype=torch.uint8)
        else:
            os.ftruncate(self._file.descriptor, entry.size_bytes)
            path = f"/dev/fd/{self._file.descriptor}"
            self._data = torch.from_file(path, shared=True, size=entry.size_bytes, dtype=torch.uint8)
        self.tensor = self._data.view(_dtype(entry.dtype)).view(entry.shape)

    @property
    def buffer(self) -> memoryview:
        return self._data.numpy().data

    def finish(self) -> None:
        if self._file is None:
            self.tensor = to_device(self.tensor, self._device)

    def pin(self) -> StoredPin | None:
        """Return where others find it, as long as this object lives; None if they can't."""
        if self._file is None:
            return None
        return StoredPin(os.getpid(), self._file.descriptor, self._entry.dtype, self._entry.shape)


@dataclass(frozen=True)
class WithStoreMetadata(ECConnectorMetadata):
    """What one step loads: from the store, and what the connector itself says.

    What was read is not pickled. A worker in another process maps what ``pins`` names, which lives as long as the original
    metadata.
    """

    inner: ECConnectorMetadata = field(default_factory=ECConnectorMetadata)
    pins: dict[str, StoredPin] = field(default_factory=dict)
    held: dict[str, Landing] = field(default_factory=dict, repr=False, compare=False)

    def __reduce__(self) -> tuple[type[WithStoreMetadata], tuple[object, ...]]:
        return WithStoreMetadata, (self.loads, self.inner, self.pins)


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
        self._noted: dict[str, Landing] = {}
        self._reader: Reader[Landing] | None = None
        self._writer: Writer | None = None
        self._recovery: Recovery | None = None
        if role is ECConnectorRole.SCHEDULER and self.is_consumer:
            self._reader = Reader(
                self._store,
                config.fingerprint,
                max_bytes=config.store_read_bytes,
                check=self._check,
                allocate=lambda entry: Landing(entry, config.device, is_shared=config.separate_processes),
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
        dtype = str(_dtype(entry.dtype)).removeprefix("torch.")
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
            return WithStoreMetadata(inner.loads, inner)
        held, self._noted = self._noted, {}
        pins = {name: pin for name, landing in held.items() if (pin := landing.pin()) is not None}
        return WithStoreMetadata((*held, *inner.loads), inner, pins, held)

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
                elif (pin := self._metadata.pins.get(identifier)) is not None:
                    self._load_pinned(identifier, pin, encoder_cache)
        self._connector.start_load_caches(encoder_cache)

    def _load_pinned(self, identifier: str, pin: StoredPin, encoder_cache: dict[str, torch.Tensor]) -> None:
        try:
            encoder_cache[identifier] = take_over(to_device(pin.tensor(), self.config.device))
        except RuntimeError as error:
            _log.warning("The embedding of item %s can't be mapped from another process: %s", identifier, error)

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

        landing = self._recovery.read(identifier, check, lambda entry: Landing(entry, "cpu", is_shared=False))
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


def _dtype(name: str) -> torch.dtype:
    return dtype_of(EntryHeader("", "", name, ()))
