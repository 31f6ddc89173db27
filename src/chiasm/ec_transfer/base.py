"""The EC connector: what moves encoder output from the instances that make it to those that read it.

An *item* is one image of a request, an *identifier* the 64 lower-case hex digits that name its embedding, an *entry* the
embedding itself: one contiguous tensor ``[tokens, levels * hidden]`` in the model's dtype, where the first ``hidden``
columns are the embedding that replaces the placeholders and the others are the DeepStack levels side by side.

A connector has two halves, and an instance makes one of each. The *scheduler role* runs where requests are scheduled:
it checks existence and decides what to load. The *worker role* runs where tensors are: it makes entries usable, and
publishes them. The only thing that passes from the first to the second is the metadata of one step. Names and order of
calls are those of vLLM's ``ECConnectorBase``, so that one connector serves both engines::

    scheduler role                                worker role
    --------------------------------------------  -----------------------------------------
    has_cache_item / ensure_cache_available
    update_state_after_alloc   (per item)
    build_connector_meta       (once a step)  ->  bind_connector_metadata
                                                  start_load_caches
                                                  save_caches          (per encoded item, producers)
                                                  clear_connector_metadata
                                                  get_finished
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol

from chiasm.options import Option

if TYPE_CHECKING:
    import torch


class ECConnectorRole(enum.Enum):
    """Which half of a connector an object is."""

    SCHEDULER = "scheduler"
    WORKER = "worker"


class ECTransferRole(enum.Enum):
    """What an instance does with entries: an encoder produces, a PD or P consumes."""

    PRODUCER = "ec_producer"
    CONSUMER = "ec_consumer"
    BOTH = "ec_both"


@dataclass(frozen=True)
class ECTransferConfig:
    """What both halves of a connector are made from.

    ``shared_storage_path`` is the folder of SharedStorageConnector; ``max_bytes`` bounds what it holds;
    ``fingerprint`` (hex, may be empty) names model, processor and dtype: entries of another fingerprint are foreign.
    ``device`` is where a worker makes entries usable (``"cpu"``, ``"cuda:0"``). ``separate_processes`` says that the two
    halves live in different processes and that what the scheduler role has promised has to be there: a connector then
    makes sure of an entry before it says yes, and keeps it until the scheduler role's metadata is gone.
    """

    connector: Annotated[str, Option("Connector that transfers embeddings.", metavar="NAME")] = "SharedStorageConnector"
    role: ECTransferRole = ECTransferRole.BOTH
    shared_storage_path: Annotated[Path | None, Option("Folder through which instances exchange embeddings.")] = None
    max_bytes: Annotated[int, Option("Maximum total size of the embedding store.", name="ec_max_bytes")] = 4 << 30
    fingerprint: str = ""
    device: str = "cpu"
    separate_processes: bool = False
    connector_module_path: Annotated[
        str | None, Option("Python module of a connector that isn't chiasm's own.", metavar="MODULE")
    ] = None
    extra: dict[str, str] = field(default_factory=dict)


class ItemLike(Protocol):
    """One item of a request, as a connector sees it."""

    @property
    def identifier(self) -> str: ...

    @property
    def offset(self) -> int:
        """Index in the prompt of the item's first placeholder token."""

    @property
    def length(self) -> int:
        """Prompt tokens from the item's first placeholder to its last, both included."""


class RequestLike(Protocol):
    """A request, as a connector sees it."""

    @property
    def request_id(self) -> str: ...

    @property
    def items(self) -> Sequence[ItemLike]: ...


@dataclass(frozen=True)
class ECConnectorMetadata:
    """What one step loads: identifiers in the order in which they are needed, each once."""

    loads: tuple[str, ...] = ()


@dataclass
class ECConnectorStats:
    """Counters since the connector was made. Seconds are wall time spent inside the connector."""

    saves: int = 0
    saved_bytes: int = 0
    save_seconds: float = 0.0
    save_failures: int = 0
    loads: int = 0
    loaded_bytes: int = 0
    load_seconds: float = 0.0
    load_failures: int = 0
    evictions: int = 0
    evicted_bytes: int = 0
    corrupt_entries: int = 0


class ECConnector(ABC):
    """Base of all EC connectors. Methods of one role are never called on an object of the other."""

    def __init__(self, config: ECTransferConfig, role: ECConnectorRole) -> None:
        self.config = config
        self.role = role
        self.stats = ECConnectorStats()
        self._metadata: ECConnectorMetadata | None = None

    @property
    def is_producer(self) -> bool:
        return self.config.role in (ECTransferRole.PRODUCER, ECTransferRole.BOTH)

    @property
    def is_consumer(self) -> bool:
        return self.config.role in (ECTransferRole.CONSUMER, ECTransferRole.BOTH)

    def shutdown(self) -> None:
        """Release what the object holds. Called once, at the end, in either role; idempotent."""
        return None

    def store_id(self) -> str:
        """Names the place where this connector's entries lie: instances that read the same name see the same entries.

        Called in either role, at start and by health checks. "" if there is no such name. Raises StorageError when the
        place cannot be reached.
        """
        return ""

    # ---- scheduler role -------------------------------------------------------------------------------------------

    @abstractmethod
    def has_cache_item(self, identifier: str) -> bool:
        """Whether the entry exists, whole and of this model, now.

        Called by the scheduler for each item that it wants and does not have, many times a second while a request waits,
        so it must cost microseconds. Raises InvalidRequestError for an identifier that is not 64 hex digits.
        An entry found may still be gone at the load: the worker then leaves it out, and it is waited for again.
        """

    def ensure_cache_available(self, request: RequestLike, num_computed_tokens: int) -> bool:
        """Whether every item that reaches past ``num_computed_tokens`` exists; called when a request is admitted."""
        return all(
            self.has_cache_item(item.identifier)
            for item in request.items
            if item.offset + item.length > num_computed_tokens
        )

    @abstractmethod
    def update_state_after_alloc(self, request: RequestLike, index: int) -> None:
        """Note that the encoder cache has room for item ``index`` of the request: the next step loads it.

        Called after ``has_cache_item`` said yes. A connector that is no consumer notes nothing.
        """

    @abstractmethod
    def build_connector_meta(self) -> ECConnectorMetadata:
        """The metadata of this step: exactly what was noted since the last call, which it then forgets."""

    # ---- worker role ----------------------------------------------------------------------------------------------

    def bind_connector_metadata(self, metadata: ECConnectorMetadata) -> None:
        """Set the metadata of the step that begins."""
        self._metadata = metadata

    def clear_connector_metadata(self) -> None:
        """Forget the metadata of the step that ended."""
        self._metadata = None

    @abstractmethod
    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor]) -> None:
        """Put each entry of the bound metadata into ``encoder_cache`` under its identifier, on the config's device.

        What is in the dict already is not loaded again. What cannot be loaded (gone, torn, foreign) is left out of the
        dict and counted in ``stats``; that raises nothing, since one request's item must not harm the step.
        """

    @abstractmethod
    def save_caches(self, encoder_cache: dict[str, torch.Tensor], mm_hash: str) -> None:
        """Publish ``encoder_cache[mm_hash]``; when it returns, any consumer finds the entry.

        Called by producers, from any thread, once per encoded item; a consumer's call does nothing. An entry that
        exists already is left as it is. Raises StorageError when the entry could not be published (a full disk).
        """

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Tell the worker which requests ended; returns the ids whose asynchronous (saves, loads) have completed.

        Called once a step in which a request ended. A synchronous connector returns ``(None, None)``.
        """
        return None, None
