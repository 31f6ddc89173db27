"""The interface of all engines."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace

import torch

from chiasm.cores import cpu_flags, has_native_bfloat16
from chiasm.ec_transfer import ECConnector, ECConnectorFactory, ECConnectorRole, ECTransferConfig
from chiasm.engine.config import EngineConfig
from chiasm.engine.core_sharing import CoreShare
from chiasm.engine.device import choose_device, choose_dtype, device_id
from chiasm.engine.request import EngineStats
from chiasm.errors import ConfigurationError
from chiasm.models import fingerprint, load_processor
from chiasm.models.base import LoadProgress
from chiasm.wire import Costs, ECPlace

logger = logging.getLogger(__name__)


class Engine(ABC):
    """One role of one model: its processor, its device and dtype, and its connection to the store of embeddings.

    ``max_model_len`` is the longest context, prompt and answer, in tokens. ``model_fingerprint`` (hex) names model, processor
    settings and dtype. Raises ConfigurationError for a device or a dtype that is not available, and for a context that is
    longer than the model's.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.device = choose_device(config.device)
        self.dtype = choose_dtype(config.dtype, config.model, self.device)
        if config.dtype == "auto" and self.device.type == "cpu":
            reason = "has" if has_native_bfloat16(cpu_flags()) else "lacks"
            logger.info("Computing in %s: this CPU %s AVX512-BF16 or AMX for bfloat16.", self.dtype_name, reason)
        self.processor = load_processor(config.model)
        self.model_fingerprint = fingerprint(config.model, self.dtype_name)
        self.max_model_len = _context(config.max_model_len, self.processor.max_model_len)
        self.device_id = device_id(self.device)
        """Names the device among all machines."""
        self.progress = LoadProgress()
        """How far ``start`` is; other threads may read it."""
        self.costs: Costs | None = None
        """What work costs, measured at start."""
        self._core_share = CoreShare(config.core_share, self.num_threads)
        self._store_id: Callable[[], str] = str
        self._ec_connector = ""
        self._ec_halves: tuple[ECConnector, ...] = ()
        self._ec_place: ECPlace | None = None

    @abstractmethod
    def start(self) -> None:
        """Load the role's weights and begin to serve. Slow; raises ConfigurationError if the model can't be served."""

    @abstractmethod
    def stop(self) -> None:
        """Stop serving. Idempotent."""

    @property
    @abstractmethod
    def healthy(self) -> bool:
        """Whether it can serve."""

    @property
    def trouble(self) -> str:
        """Why it can't serve; empty if it can, or doesn't know."""
        return ""

    @abstractmethod
    def stats(self) -> EngineStats:
        """Return a snapshot; cheap, from any thread."""

    def outstanding_seconds(self) -> float:
        """Return about how long the work takes that is not done, of a CPU on one core; without the rest of answers."""
        return 0.0

    def free_bytes(self) -> int | None:
        """Return the room for embeddings before any has to go; None if it isn't known."""
        return None

    def unfetched_embeddings(self) -> int:
        """Return how many embeddings others have yet to fetch from here, or are being written to the shared cache."""
        return 0

    @property
    def dtype_name(self) -> str:
        """``float32``, ``bfloat16`` or ``float16``."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def num_threads(self) -> int:
        """Intra-op CPU threads."""
        return self.config.threads or int(torch.get_num_threads())

    def store_id(self) -> str:
        """Return the current name of the store of embeddings, or "" if this engine exchanges none.

        May read a file, so don't call it on an event loop. Raises StorageError.
        """
        return self._store_id()

    @property
    def ec_connector(self) -> str:
        """What exchanges embeddings here; empty if this engine exchanges none."""
        return self._ec_connector

    @property
    def ec_faults(self) -> int:
        """How many errors the EC connector has raised where it shouldn't. Any thread."""
        return sum(half.faults.count for half in self._ec_halves)

    @property
    def ec_place(self) -> ECPlace | None:
        """Where language models find the embeddings of this engine, if it encodes and they don't find them without."""
        return self._ec_place

    def _connect(self, config: ECTransferConfig, entry_width: int) -> tuple[ECConnector, ECConnector]:
        """Make both halves of the EC connector, scheduler role first; entries have ``entry_width`` columns.

        Raises StorageError if the place of the entries is unreachable.
        """
        config = replace(
            config,
            fingerprint=self.model_fingerprint,
            device=str(self.device),
            dtype=self.dtype_name,
            entry_width=entry_width,
        )
        scheduler_role = ECConnectorFactory.create_connector(config, ECConnectorRole.SCHEDULER)
        worker_role = ECConnectorFactory.create_connector(config, ECConnectorRole.WORKER)
        scheduler_role.meet(worker_role)
        worker_role.meet(scheduler_role)
        self._store_id = scheduler_role.store_id
        self._store_id()  # an unreachable store fails the start
        self._ec_connector = config.connector
        self._ec_halves = scheduler_role, worker_role
        self._ec_place = worker_role.place() if worker_role.is_producer else None
        return scheduler_role, worker_role


def _context(wanted: int | None, longest: int) -> int:
    """Return the tokens of prompt and answer together. Raises ConfigurationError if the model doesn't support so many."""
    if wanted is not None and wanted > longest:
        raise ConfigurationError(
            f"--max-model-len is {wanted}, but the model supports {longest} tokens (max_position_embeddings in its "
            f"config.json); give at most {longest}, or leave the option out."
        )
    return wanted or longest
