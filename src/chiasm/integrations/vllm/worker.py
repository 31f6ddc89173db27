"""The connector's half in vLLM's workers: loads entries into the encoder cache, and publishes embeddings."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable

import torch

from chiasm.connectors.faults import log_failure, logged
from chiasm.ec_transfer import ECConnector
from chiasm.ec_transfer.stores.writer import StoreWrites
from chiasm.errors import InvalidRequestError, StorageError
from chiasm.integrations.vllm.messages import CounterWriter, StepMetadata, StepReport

_logger = logging.getLogger(__name__)


class WorkerHalf:
    """Ensures that ``encoder_cache`` has what the scheduler relies on when the model runs.

    vLLM's engine stops if it is not. So if an entry cannot be loaded in spite of all that the scheduler does, zeros of its
    shape take its place, and the scheduler is informed and fails the requests that use them.
    """

    def __init__(self, store: ECConnector, dtype: torch.dtype, *, is_writer: Callable[[], bool]) -> None:
        """``store`` is the connector's worker role. ``is_writer`` returns whether this rank saves what is encoded; it is
        called when there is something to save.
        """
        self._store = store
        self._dtype = dtype
        self._is_writer = is_writer
        self._metadata: StepMetadata | None = None
        self._report: StepReport | None = None
        self._counters: CounterWriter | None = None
        self._has_asked_for_counters = False
        self._zeros: dict[str, torch.Tensor] = {}

    def bind(self, metadata: StepMetadata) -> None:
        """Begin a step."""
        self._metadata = metadata
        self._report = None
        with logged(self._store, "begin a step, so the requests that need what it loads fail"):
            self._store.bind_connector_metadata(metadata.loads)
        if not self._has_asked_for_counters and metadata.counters and self._is_writer():
            self._has_asked_for_counters = True
            with contextlib.suppress(OSError):
                self._counters = CounterWriter(metadata.counters)
        self._write_counters()  # the shared cache is written to beside the steps

    def clear(self) -> None:
        """End the step."""
        self._metadata = None
        with logged(self._store, "end a step"):
            self._store.clear_connector_metadata()

    def start_save_caches(self, encoder_cache: dict[str, torch.Tensor]) -> None:
        """Publish again what consumers don't find any more; called on a producer before its encoder runs."""
        for identifier in self._metadata.publish if self._metadata is not None else ():
            if identifier in encoder_cache:
                self.save_caches(encoder_cache, identifier)

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor]) -> None:
        """Put the embeddings of the step, or zeros, into ``encoder_cache``; called before the model runs."""
        metadata = self._metadata
        if metadata is None or not metadata.expected:
            return
        self._zeros = {name: zeros for name, zeros in self._zeros.items() if encoder_cache.get(name) is zeros}
        for identifier in self._zeros.keys() & metadata.expected.keys():
            del encoder_cache[identifier], self._zeros[identifier]
        try:
            self._store.start_load_caches(encoder_cache)
        except Exception as error:  # such as too little memory on the device; it must not end the engine
            _logger.warning("Embeddings could not be loaded: %r", error)
        failed = []
        for identifier, shape in metadata.expected.items():
            loaded = encoder_cache.get(identifier)
            is_fitting = loaded is not None and (tuple(loaded.shape), loaded.dtype) == (shape, self._dtype)
            if loaded is not None and not is_fitting:
                reason = (
                    f"it has shape {list(loaded.shape)} and {loaded.dtype}, but a request needs {list(shape)} and "
                    f"{self._dtype}"
                )
                with logged(self._store, f"discard the embedding of item {identifier}"):
                    self._store.discard(identifier, reason)
            if not is_fitting:
                zeros = torch.zeros(shape, dtype=self._dtype, device=self._store.config.device)
                encoder_cache[identifier] = self._zeros[identifier] = zeros
                failed.append(identifier)
        self._report = StepReport(metadata.step, frozenset(failed))
        self._write_counters()

    def save_caches(self, encoder_cache: dict[str, torch.Tensor], mm_hash: str) -> None:
        """Publish an embedding. A failure costs the entry and nothing else: the scheduler looks before it names an item."""
        if not self._is_writer() or encoder_cache[mm_hash] is self._zeros.get(mm_hash):
            return
        try:
            self._store.save_caches(encoder_cache, mm_hash)
        except InvalidRequestError:
            return  # the scheduler has refused the request already
        except StorageError:
            pass  # the connector has logged it
        except Exception:
            log_failure(self._store, f"publish the embedding of item {mm_hash}")
        self._write_counters()

    def report(self) -> StepReport | None:
        """Return the report of the step, once; None if it loaded nothing."""
        report, self._report = self._report, None
        return report

    def _write_counters(self) -> None:
        if self._counters is not None:
            writes = self._store.store_stats
            self._counters.write(self._store.stats, writes if isinstance(writes, StoreWrites) else None)
