"""What the engines of all roles are made of, and what each says of itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace

from chiasm.ec_transfer import ECConnector, ECConnectorFactory, ECConnectorRole, ECTransferConfig
from chiasm.engine.config import EngineConfig
from chiasm.engine.device import choose_device, choose_dtype, threads_used
from chiasm.engine.stats import EngineStats
from chiasm.models import fingerprint, load_processor


class Engine(ABC):
    """A model's processor, and where and in which dtype its weights will be.

    ``max_model_len`` is the longest context, prompt and answer, in tokens. ``model_fingerprint`` (hex) names model, processor
    and dtype. Raises ConfigurationError for a device or a dtype that isn't there.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.device = choose_device(config.device)
        self.dtype = choose_dtype(config.dtype, config.model, self.device)
        self.processor = load_processor(config.model)
        self.model_fingerprint = fingerprint(config.model, self.dtype_name)
        self.max_model_len = min(config.max_model_len or self.processor.max_model_len, self.processor.max_model_len)
        self._store_id: Callable[[], str] = str

    @abstractmethod
    def start(self) -> None:
        """Load the role's weights and begin to serve. Slow; raises ConfigurationError when the model can't be served."""

    @abstractmethod
    def stop(self) -> None:
        """End what runs. Idempotent."""

    @property
    @abstractmethod
    def healthy(self) -> bool:
        """Whether it can serve."""

    @abstractmethod
    def stats(self) -> EngineStats:
        """A snapshot; cheap, from any thread."""

    @property
    def dtype_name(self) -> str:
        """``float32``, ``bfloat16`` or ``float16``."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def num_threads(self) -> int:
        """That one operator uses, on the CPU."""
        return threads_used(self.config.threads)

    def store_id(self) -> str:
        """Names the place of the embeddings as it is now; empty where none are exchanged.

        May read a file: not to be called on an event loop. Raises StorageError.
        """
        return self._store_id()

    def _connect(self, config: ECTransferConfig) -> tuple[ECConnector, ECConnector]:
        """Both halves of the EC connector, scheduler role first. Raises what says that its place can't be reached."""
        config = replace(config, fingerprint=self.model_fingerprint, device=str(self.device))
        scheduler_role = ECConnectorFactory.create_connector(config, ECConnectorRole.SCHEDULER)
        worker_role = ECConnectorFactory.create_connector(config, ECConnectorRole.WORKER)
        self._store_id = scheduler_role.store_id
        self._store_id()  # what cannot be reached fails now
        return scheduler_role, worker_role
