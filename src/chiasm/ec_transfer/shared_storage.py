"""The reference connector: a folder that producers and consumers share, with one safetensors file per entry.

The folder is on a tmpfs if all instances run on one host, otherwise on a shared file system.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from chiasm.ec_transfer.arrivals import Arrivals
from chiasm.ec_transfer.base import (
    ECConnector,
    ECConnectorMetadata,
    ECConnectorRole,
    ECTransferConfig,
    RequestLike,
    check_identifier,
)
from chiasm.ec_transfer.bounded_folder import BoundedFolder, Signature
from chiasm.ec_transfer.device import take_over, to_device
from chiasm.ec_transfer.entry_file import (
    HEADER_BYTES,
    Entry,
    EntryHeader,
    InvalidEntryError,
    Known,
    bytes_of,
    dtype_of,
    header_of,
    open_entry,
    write_entry,
)
from chiasm.ec_transfer.extra_config import SharedStorageConfig
from chiasm.ec_transfer.folder_check import examine_folder, files_may_be_mapped
from chiasm.ec_transfer.pins import Pin, PinnedMetadata
from chiasm.ec_transfer.wake import Wake
from chiasm.errors import ConfigurationError, StorageError

_logger = logging.getLogger(__name__)
_Value = TypeVar("_Value")

_FINGERPRINT = re.compile(r"[0-9a-f]{0,128}")
_MAX_KNOWN = 4096
_MAX_HELD = 64
_MAX_HELD_OPEN = 256
_MAX_ARRIVED = 64


class Ready(NamedTuple):
    """An entry that a step can take."""

    entry: Entry
    tensor: torch.Tensor | None = None
    """The embedding, verified and on ``config.device``; None if the worker has to make it."""


class SharedStorageConnector(ECConnector):
    """Moves entries through files in the folder that :class:`SharedStorageConfig` names.

    An entry appears complete or not at all, and is read on the CPU without a copy unless the disk is nearly full. The least
    recently used entries are evicted to stay within ``config.max_bytes``. A file that is torn, foreign or of another model is
    treated as missing, counted in ``stats.corrupt_entries`` and removed.

    Once it has been told whom to wake, the scheduler role of a consumer brings what requests want into memory in a thread of
    its own, which looks for the files, since a folder calls nobody. Until then, ``has_cache_item`` looks into the folder.

    What ``has_cache_item`` finds can be loaded until the step is over, even if it is evicted. If both roles live in one
    process, the scheduler role maps the file and its metadata carries the mapping. With ``config.separate_processes`` it
    copies the file to anonymous memory and verifies the checksum, and the worker maps that copy through ``/proc``. A worker on
    another host looks for the file by its name, and leaves out an entry that is gone.

    Raises ConfigurationError for a path, limit or fingerprint that cannot work.
    """

    def __init__(self, config: ECTransferConfig, role: ECConnectorRole) -> None:
        super().__init__(config, role)
        if not _FINGERPRINT.fullmatch(config.fingerprint):
            raise ConfigurationError("The fingerprint must be at most 128 lower-case hex digits.")
        if config.max_bytes <= HEADER_BYTES:
            raise ConfigurationError(
                f"max_bytes must be more than {HEADER_BYTES} bytes, the size of an entry's header."
            )
        publishes = self.is_producer and role is ECConnectorRole.WORKER
        path = _usable_folder(self.read_extra_config(SharedStorageConfig).shared_storage_path, publishes)
        self._folder = BoundedFolder(path, config.max_bytes, self._count_eviction)
        if config.separate_processes and not hasattr(os, "memfd_create"):
            raise ConfigurationError("SharedStorageConnector needs Linux if its halves are in separate processes.")
        # Truncating a mapped file kills its readers with SIGBUS, which would end an engine whose loads must not fail.
        self._mapped = not config.separate_processes and files_may_be_mapped(path)
        self._max_held = _MAX_HELD_OPEN if config.separate_processes else _MAX_HELD
        self._lock = threading.Lock()  # for the stats and tables, since producers save and probe from several threads
        self._headers: OrderedDict[str, Known] = OrderedDict()
        self._verified: OrderedDict[str, Signature] = OrderedDict()
        self._rejected: OrderedDict[str, Signature] = OrderedDict()
        self._warned_of: set[int | None] = set()
        self._save_failure: tuple[int | None] | None = None
        """The errno of the last save if it failed."""
        self._arrivals: Arrivals[Entry, Ready] | None = None
        self._held: OrderedDict[str, Entry] = OrderedDict()
        self._noted: dict[str, Ready] = {}
        try:
            self._folder.store_id()
            if publishes:
                self._folder.recount()
        except OSError as error:
            raise ConfigurationError(f"Cannot use the shared storage path {path}: {error}") from error

    def store_id(self) -> str:
        """Return the 32 hex digits that name the folder. Raises StorageError if it cannot be reached."""
        try:
            return self._folder.store_id()
        except OSError as error:
            raise StorageError(f"Cannot read the store-id of {self._folder.path}: {error}") from error

    @property
    def max_entry_bytes(self) -> int:
        return self.config.max_bytes - HEADER_BYTES

    def shutdown(self) -> None:
        if self._arrivals is not None:
            self._arrivals.stop()
        self._held.clear()
        self._noted.clear()
        self.clear_connector_metadata()

    # ---- scheduler role -------------------------------------------------------------------------------------------

    def set_wake(self, wake: Wake) -> None:
        if self.is_consumer and self.role is ECConnectorRole.SCHEDULER:
            self._arrivals = Arrivals(
                self._find_unread, self._bring, wake, max_bytes=self.config.receive_bytes, max_count=_MAX_ARRIVED
            )

    def ensure_cache_available(self, request: RequestLike, num_computed_tokens: int) -> bool:
        if self._arrivals is not None:
            for item in request.items:
                identifier = check_identifier(item.identifier)
                is_needed = item.offset + item.length > num_computed_tokens
                self._arrivals.want(request.request_id, identifier, item.length, is_needed=is_needed)
        return all(
            self._find(check_identifier(item.identifier)) is not None
            for item in request.items
            if item.offset + item.length > num_computed_tokens
        )

    def has_cache_item(self, identifier: str) -> bool:
        check_identifier(identifier)
        if self._arrivals is not None and self._arrivals.is_wanted(identifier):
            return self._arrivals.ask(identifier)
        if identifier in self._held:
            return True
        entry = self._find(identifier)
        if entry is not None and not self.is_consumer:
            entry = self._verify(identifier, entry)  # what is damaged must be published again
        elif entry is not None and self.config.separate_processes:
            entry = self._copied(identifier, entry)
        if entry is not None and self.is_consumer:
            with self._lock:
                _remember(self._held, identifier, entry, self._max_held)
        return entry is not None

    def layout_of(self, identifier: str) -> tuple[tuple[int, ...], torch.dtype] | None:
        check_identifier(identifier)
        ready = self._arrivals.ready(identifier) if self._arrivals is not None else None
        if ready is not None:
            header: EntryHeader | None = ready.entry.header
        elif self.is_consumer:
            header = self._held[identifier].header if identifier in self._held else None
        else:
            header = self.published(identifier)
        return None if header is None else (header.shape, dtype_of(header))

    def is_published(self, identifier: str) -> bool:
        return self.published(identifier) is not None

    def is_coming(self, identifier: str) -> bool:
        arrived = self._arrivals is not None and self._arrivals.ready(identifier) is not None
        return arrived or self.published(identifier) is not None

    def request_finished(self, request: RequestLike) -> None:
        if self._arrivals is not None:
            self._arrivals.finish(request.request_id, [item.identifier for item in request.items])

    def published(self, identifier: str) -> EntryHeader | None:
        """Return the header of the entry, if it exists. It may be gone the next moment, unlike after ``has_cache_item``."""
        entry = self._find(check_identifier(identifier))
        return None if entry is None else entry.header

    def update_state_after_alloc(self, request: RequestLike, index: int) -> None:
        identifier = check_identifier(request.items[index].identifier)
        if not self.is_consumer or identifier in self._noted:
            return
        if self._arrivals is not None and self._arrivals.is_wanted(identifier):
            if (ready := self._arrivals.take(identifier)) is not None:
                self._noted[identifier] = ready
        elif self.has_cache_item(identifier):
            self._noted[identifier] = Ready(self._held[identifier])

    def build_connector_meta(self) -> ECConnectorMetadata:
        noted, self._noted = self._noted, {}
        self._held.clear()
        if self._arrivals is not None:
            self._arrivals.end_round()
        pins = {
            identifier: Pin.here(ready.entry.descriptor, ready.entry.header)
            for identifier, ready in noted.items()
            if self.config.separate_processes
        }
        return PinnedMetadata(tuple(noted), noted, pins)

    # ---- worker role ----------------------------------------------------------------------------------------------

    def bind_connector_metadata(self, metadata: ECConnectorMetadata) -> None:
        for identifier in metadata.loads:
            check_identifier(identifier)
        super().bind_connector_metadata(metadata)

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor]) -> None:
        if self._metadata is None or not self.is_consumer:
            return
        metadata: PinnedMetadata[Ready] = (
            self._metadata if isinstance(self._metadata, PinnedMetadata) else PinnedMetadata()
        )
        for identifier in self._metadata.loads:
            if identifier in encoder_cache:
                continue
            started = time.perf_counter()
            tensor = self._load(identifier, metadata.held.get(identifier), metadata.pins.get(identifier))
            seconds = time.perf_counter() - started
            with self._lock:
                self.stats.load_seconds += seconds
                if tensor is None:
                    self.stats.load_failures += 1
                else:
                    self.stats.loads += 1
                    self.stats.loaded_bytes += tensor.nbytes
                    encoder_cache[identifier] = tensor

    def discard(self, identifier: str, reason: str) -> None:
        entry = self._find(check_identifier(identifier))
        self._held.pop(identifier, None)
        if entry is not None:
            self._reject(identifier, entry.known.signature, reason)
        if self._arrivals is not None:
            self._arrivals.discard(identifier)

    def save_caches(self, encoder_cache: dict[str, torch.Tensor], mm_hash: str) -> None:
        check_identifier(mm_hash)
        if not self.is_producer:
            return
        existing = self._find(mm_hash)
        if existing is not None and self._verify(mm_hash, existing) is not None:
            return
        started = time.perf_counter()
        saved_bytes = 0
        try:
            tensor = encoder_cache[mm_hash]
            header = header_of(mm_hash, self.config.fingerprint, tensor)
            data = bytes_of(tensor)
            self._folder.publish(mm_hash, HEADER_BYTES + len(data), lambda file: write_entry(file, header, data))
            saved_bytes = len(data)
        except StorageError as error:
            self._note_save_failure(error)
            raise
        finally:
            with self._lock:
                self.stats.save_seconds += time.perf_counter() - started
        with self._lock:
            self.stats.saves += 1
            self.stats.saved_bytes += saved_bytes
            recovered, self._save_failure = self._save_failure, None
        if recovered is not None:
            _logger.info("Entries can be written to %s again.", self._folder.path)

    # ---- finding and loading --------------------------------------------------------------------------------------

    def _find(self, identifier: str) -> Entry | None:
        """Return the entry if its file exists and has the right header. Takes a few system calls, whatever its size."""
        known = self._headers.get(identifier)
        try:
            entry = open_entry(
                self._folder.entry_path(identifier),
                identifier,
                self.config.fingerprint,
                known,
                mapped=self._mapped,
            )
        except FileNotFoundError:
            return None
        except InvalidEntryError as error:
            self._reject(identifier, error.signature, str(error))
            return None
        except OSError as error:
            self._warn_once(error)
            return None
        if entry.known.signature == self._rejected.get(identifier):
            return None
        if entry.known is not known:
            with self._lock:
                _remember(self._headers, identifier, entry.known, _MAX_KNOWN)
        return entry

    def _find_unread(self, identifier: str) -> tuple[Entry, int] | None:
        entry = self._find(identifier)
        return None if entry is None else (entry, entry.header.data_bytes)

    def _load(self, identifier: str, held: Ready | None, pin: Pin | None) -> torch.Tensor | None:
        """Return the tensor on ``config.device``, or None if it cannot be loaded. A pinned copy has been verified already."""
        if held is not None and held.tensor is not None:
            return take_over(held.tensor)
        if held is None and pin is not None:
            try:
                return pin.load(self.config.device)
            except OSError as error:
                self._warn_once(error)  # The file itself may still be good.
        entry = held.entry if held is not None else self._find(identifier)
        if entry is None or self._verify(identifier, entry) is None:
            return None
        tensor = self._tensor_of(entry)
        return None if tensor is None else take_over(tensor)

    def _bring(self, identifier: str, entry: Entry) -> Ready | None:
        """Return an entry that was found, ready for a step, or None if it is unusable. Called in the thread of arrivals."""
        if self.config.separate_processes:
            copy = self._copied(identifier, entry)
            return None if copy is None else Ready(copy)
        started = time.perf_counter()
        tensor = None if self._verify(identifier, entry) is None else self._tensor_of(entry)
        with self._lock:
            self.stats.load_seconds += time.perf_counter() - started
        return None if tensor is None else Ready(entry, tensor)

    def _copied(self, identifier: str, entry: Entry) -> Entry | None:
        """Return a verified copy of the entry in anonymous memory, or None if it is unusable."""
        started = time.perf_counter()
        copy = self._verify(identifier, entry, copies=True)
        with self._lock:
            self.stats.load_seconds += time.perf_counter() - started
        return copy

    def _tensor_of(self, entry: Entry) -> torch.Tensor | None:
        """Return the embedding on ``config.device``, or None if it cannot be read."""
        try:
            tensor = to_device(entry.tensor(), self.config.device)
            # On a small disk, evicted entries that are still mapped would leave no room for new ones.
            return tensor.clone() if self._mapped and tensor.is_cpu and not self._folder.is_roomy() else tensor
        except OSError as error:
            self._warn_once(error)
            return None

    def _verify(self, identifier: str, entry: Entry, *, copies: bool = False) -> Entry | None:
        """Return the entry, or a copy of it, if its checksum is right, which is computed once per file; None otherwise."""
        signature = entry.known.signature
        is_verified = self._verified.get(identifier) == signature
        verified: Entry | None = entry
        try:
            if copies:
                verified = entry.copied(checked=is_verified)
            elif not is_verified and not entry.matches_checksum():
                verified = None
        except OSError as error:
            self._warn_once(error)
            return None
        if verified is None:
            self._reject(identifier, signature, "its checksum is wrong")
        elif not is_verified:
            with self._lock:
                _remember(self._verified, identifier, signature, _MAX_KNOWN)
        return verified

    def _reject(self, identifier: str, signature: Signature, reason: str) -> None:
        """Count and remove a file that is not a usable entry, once. If the folder is locked, leave that to the next call."""
        if self._rejected.get(identifier) == signature or not self._folder.remove(identifier, signature):
            return
        with self._lock:
            if self._rejected.get(identifier) == signature:
                return  # Another thread has removed it at the same time.
            _remember(self._rejected, identifier, signature, _MAX_KNOWN)
            self.stats.corrupt_entries += 1
        _logger.warning("The file of item %s in %s was rejected: %s.", identifier, self._folder.path, reason)

    def _note_save_failure(self, error: StorageError) -> None:
        """Count a failure, and log it unless the last save failed for the same reason."""
        kind = error.__cause__.errno if isinstance(error.__cause__, OSError) else None
        with self._lock:
            self.stats.save_failures += 1
            is_new, self._save_failure = self._save_failure != (kind,), (kind,)
        if is_new:
            _logger.error("%s Further failures of this kind are only counted, until a save succeeds.", error.message)

    def _warn_once(self, error: OSError) -> None:
        if error.errno not in self._warned_of:
            self._warned_of.add(error.errno)
            _logger.warning(
                "An entry in %s is treated as missing because it cannot be read: %s", self._folder.path, error
            )

    def _count_eviction(self, size_bytes: int) -> None:
        with self._lock:
            self.stats.evictions += 1
            self.stats.evicted_bytes += size_bytes


def _usable_folder(path: Path, publishes: bool) -> Path:
    """Return the folder's absolute path, and create it for its owner alone if there is none. Raises ConfigurationError."""
    try:
        path = path.resolve()
        if findings := examine_folder(path, writes=publishes):
            raise ConfigurationError(" ".join(finding.message for finding in findings))
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"Cannot create the shared storage path {path}: {error}") from error
    return path


def _remember(table: OrderedDict[str, _Value], key: str, value: _Value, limit: int) -> None:
    """Set an item of a table, and drop the oldest item above ``limit``."""
    table[key] = value
    table.move_to_end(key)
    if len(table) > limit:
        table.popitem(last=False)
