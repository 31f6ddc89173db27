"""A connector together with a store, the second place where embeddings are looked for."""

from __future__ import annotations

import itertools
import logging
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
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
from chiasm.ec_transfer.stores.reader import Rank, Reader, StoreReads
from chiasm.ec_transfer.stores.writer import StoreWrites, Writer
from chiasm.errors import ConfigurationError
from chiasm.wire import ECPlace

_log = logging.getLogger(__name__)
_MAX_TOLD = 65536
"""Entries that the proxy calls stored and no request has wanted yet; the oldest are forgotten."""


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


class _Wanted:
    """An item that requests want."""

    def __init__(self, max_rows: int) -> None:
        self.rank: Rank = (0, 0)
        """When the scheduler asked for it: what it asks for in its latest round is needed first, in the order of asking."""
        self.max_rows = max_rows
        self.requests: set[str] = set()
        self.is_needed = False
        """Whether the scheduler has asked for it, so that it isn't in its memory."""


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
        self._wake: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        self._told: OrderedDict[str, None] = OrderedDict()
        self._wanted: dict[str, _Wanted] = {}
        self._round = 0
        self._asked = itertools.count()
        self._noted: dict[str, Landing] = {}
        self._reader: Reader[Landing] | None = None
        self._writer: Writer | None = None
        if role is ECConnectorRole.SCHEDULER and self.is_consumer:
            self._reader = Reader(
                self._store,
                config.fingerprint,
                max_bytes=config.store_read_bytes,
                allocate=lambda entry: Landing(entry, config.device, is_shared=config.separate_processes),
                is_elsewhere=connector.is_coming,
                on_change=self._change,
            )
        if role is ECConnectorRole.WORKER and self.is_producer:
            self._writer = Writer(self._store, config.store_queue_bytes)

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
        self._store.close()
        self._connector.shutdown()

    def store_id(self) -> str:
        return self._connector.store_id()

    @property
    def max_entry_bytes(self) -> int:
        return self._connector.max_entry_bytes

    def free_bytes(self) -> int | None:
        return self._connector.free_bytes()

    def num_unfetched(self) -> int:
        is_writing = self._writer is not None and self._writer.stats.queued_bytes > 0
        return self._connector.num_unfetched() + is_writing

    # ---- scheduler role -------------------------------------------------------------------------------------------

    def set_wake(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._connector.set_wake(wake)

    def _change(self) -> None:
        self._wake()

    def expect(self, places: Mapping[str, ECPlace], stored: Collection[str] = ()) -> None:
        self._connector.expect(places, stored)
        if self._reader is None:
            return
        with self._lock:
            for identifier in places:
                self._told.pop(identifier, None)
            for identifier in stored:
                self._told[identifier] = None
                self._told.move_to_end(identifier)
                self._read_if_needed(identifier)
            while len(self._told) > _MAX_TOLD:
                self._told.popitem(last=False)

    def _read_if_needed(self, identifier: str) -> None:
        """Have an entry read that is stored and needed. Under the lock; what was said of it is used up."""
        wanted = self._wanted.get(identifier)
        if wanted is None or not wanted.is_needed or identifier not in self._told or self._reader is None:
            return
        del self._told[identifier]
        self._reader.want(identifier, wanted.rank, lambda entry: self._check(entry, wanted.max_rows))

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
        if self._connector.has_cache_item(identifier):
            return True
        if self._reader is None:
            return False
        with self._lock:
            wanted = self._wanted.get(identifier)
            if wanted is None:
                return False
            wanted.is_needed, wanted.rank = True, (-self._round, next(self._asked))
            self._read_if_needed(identifier)
        return self._reader.promise(identifier, wanted.rank)

    def layout_of(self, identifier: str) -> tuple[tuple[int, ...], torch.dtype] | None:
        known = self._connector.layout_of(identifier)
        if known is not None or self._reader is None:
            return known
        landing = self._reader.ready(identifier)
        return None if landing is None else (tuple(landing.tensor.shape), landing.tensor.dtype)

    def is_published(self, identifier: str) -> bool:
        return self._connector.is_published(identifier)

    def is_coming(self, identifier: str) -> bool:
        with self._lock:  # an entry moves from one to the other
            if self._reader is not None and (identifier in self._told or identifier in self._reader):
                return True
        return self._connector.is_coming(identifier)

    def ensure_cache_available(self, request: RequestLike, num_computed_tokens: int) -> bool:
        is_available = self._connector.ensure_cache_available(request, num_computed_tokens)
        if self._reader is None:
            return is_available
        with self._lock:
            for item in request.items:
                wanted = self._wanted.get(item.identifier)
                if wanted is None:
                    wanted = self._wanted[item.identifier] = _Wanted(item.length)
                wanted.max_rows = max(wanted.max_rows, item.length)
                wanted.requests.add(request.request_id)
        return is_available

    def update_state_after_alloc(self, request: RequestLike, index: int) -> None:
        identifier = request.items[index].identifier
        landing = self._reader.take(identifier) if self._reader is not None else None
        with self._lock:
            if (wanted := self._wanted.get(identifier)) is not None:
                wanted.is_needed = False  # until the scheduler asks again
        if landing is not None:
            self._noted[identifier] = landing
        elif identifier not in self._noted:
            self._connector.update_state_after_alloc(request, index)

    def build_connector_meta(self) -> ECConnectorMetadata:
        inner = self._connector.build_connector_meta()
        if self._reader is None:
            return inner
        self._reader.end_promises()
        self._round += 1
        if not self._noted:
            return WithStoreMetadata(inner.loads, inner)
        held, self._noted = self._noted, {}
        pins = {name: pin for name, landing in held.items() if (pin := landing.pin()) is not None}
        return WithStoreMetadata((*held, *inner.loads), inner, pins, held)

    def request_finished(self, request: RequestLike) -> None:
        self._connector.request_finished(request)
        if self._reader is None:
            return
        with self._lock:
            for item in request.items:
                wanted = self._wanted.get(item.identifier)
                if wanted is None:
                    continue
                wanted.requests.discard(request.request_id)
                if not wanted.requests:
                    del self._wanted[item.identifier]
                    self._reader.leave(item.identifier)

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
            self._reader.leave(identifier)
        self._connector.discard(identifier, reason)

    def save_caches(self, encoder_cache: dict[str, torch.Tensor], mm_hash: str) -> None:
        self._connector.save_caches(encoder_cache, mm_hash)
        if self._writer is None:
            return
        tensor = encoder_cache[mm_hash]

        def make() -> tuple[StoredEntry, memoryview]:
            header = header_of(mm_hash, self.config.fingerprint, tensor)
            data = bytes_of(tensor)
            return StoredEntry.of(mm_hash, self.config.fingerprint, header.dtype, header.shape, data), data

        self._writer.offer(mm_hash, tensor.nbytes, make)


def _dtype(name: str) -> torch.dtype:
    return dtype_of(EntryHeader("", "", name, ()))
