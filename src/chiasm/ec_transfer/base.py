"""The EC connector: moves encoder output from the instances that make it to the instances that read it.

An *item* is one image of a request. An *identifier*, 64 lower-case hex digits, names its embedding. An *entry* is the
embedding itself: one contiguous tensor ``[tokens, levels * hidden]`` in the model's dtype, where the first ``hidden`` columns
replace the embeddings of the placeholders and the others are the DeepStack levels.

A connector has two halves, and an instance makes one of each. The half with the *scheduler role* runs where requests are
scheduled: it checks which entries exist and notes which to load. The half with the *worker role* runs where tensors are: it
loads entries and publishes them. The metadata of a step is all that passes from the first to the second::

    scheduler role                                worker role
    --------------------------------------------  -----------------------------------------
    set_wake                   (once)             place                (once, producers)
    expect                     (any thread)
    ensure_cache_available     (on admission)
    has_cache_item             (per wanted item)
    update_state_after_alloc   (per item)
    build_connector_meta       (once per step) -> bind_connector_metadata
                                                  start_load_caches
                                                  clear_connector_metadata
    request_finished           (per request)      save_caches          (per encoded item, producers)

A consumer learns which embeddings a request wants when the request is admitted, and the proxy tells it where they are or will
be (``expect``), in either order. It brings them into its memory and verifies them on threads of its own, and then calls what
``set_wake`` was given. So a step only takes what is there, and nobody has to ask in vain.

Names and meanings are those of vLLM's ``ECConnectorBase``, where it has them. A connector written against this class serves
chiasm's own engine and, through ``chiasm.integrations.vllm``, vLLM.
"""

from __future__ import annotations

import enum
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol, TypeVar

from chiasm.connectors.extra_config import read_extra_config
from chiasm.connectors.factory import ClassPath, ConnectorFactory
from chiasm.connectors.faults import Faults
from chiasm.ec_transfer.extra_config import EXTRA_CONFIGS
from chiasm.ec_transfer.lookout import Lookout
from chiasm.ec_transfer.stores.base import StoreURL
from chiasm.ec_transfer.wake import Wake
from chiasm.errors import Code, InvalidRequestError
from chiasm.fleet_key import FleetKey
from chiasm.options import Option
from chiasm.wire import ECPlace

if TYPE_CHECKING:
    import torch

    from chiasm.ec_transfer.stores.reader import StoreReads
    from chiasm.ec_transfer.stores.writer import StoreWrites

_IDENTIFIER = re.compile(r"[0-9a-f]{64}")
_SHOWN_CHARACTERS = 72
_ConfigT = TypeVar("_ConfigT")


class ECConnectorRole(enum.Enum):
    """Which half of a connector an object is."""

    SCHEDULER = "scheduler"
    WORKER = "worker"


class ECTransferRole(enum.Enum):
    """What an instance does with entries: an encoder produces them, a PD or prefill instance consumes them."""

    PRODUCER = "ec_producer"
    CONSUMER = "ec_consumer"
    BOTH = "ec_both"


@dataclass(frozen=True)
class ECTransferConfig:
    """The configuration from which both halves of a connector are made."""

    connector: Annotated[str, Option("Connector that transfers embeddings.", metavar="NAME")] = "SharedStorageConnector"
    role: ECTransferRole = ECTransferRole.BOTH
    max_bytes: Annotated[int, Option("Maximum total size of the embeddings that are kept.", name="ec_max_bytes")] = (
        4 << 30
    )
    receive_bytes: Annotated[
        int, Option("Maximum size of the embeddings that are on their way to an instance.", name="ec_receive_bytes")
    ] = 512 << 20
    fingerprint: str = ""
    """Names model, processor settings and dtype, in hex. Entries with another fingerprint are treated as missing."""
    device: str = "cpu"
    """Where a worker loads entries to, such as ``cpu`` or ``cuda:0``."""
    separate_processes: bool = False
    """Whether the two halves live in different processes, and the worker must find everything that the scheduler role has
    found. A connector then verifies an entry before ``has_cache_item`` returns true, and keeps it until the metadata in the
    scheduler's process is gone. There may be several workers, and each loads what a step says; one publishes."""
    dtype: str = ""
    """The dtype of all entries, as ``float32``; empty if it isn't known."""
    entry_width: int = 0
    """Columns of all entries; 0 if it isn't known."""
    store: StoreURL = field(default="", repr=False)
    """Beside the connector. Empty: none."""
    store_read_bytes: Annotated[
        int,
        Option(
            "Maximum size of the embeddings that are read from --ec-store ahead of their use.",
            name="ec_store_read_bytes",
        ),
    ] = 512 << 20
    store_queue_bytes: Annotated[
        int,
        Option(
            "Maximum size of the embeddings that wait to be written to --ec-store; an encoder drops others.",
            name="ec_store_queue_bytes",
        ),
    ] = 256 << 20
    connector_module_path: Annotated[
        str | None, Option("Python module of a connector that isn't chiasm's own.", metavar="MODULE")
    ] = None
    fleet_key: FleetKey | None = field(default=None, repr=False)
    """By which the instances of a fleet know each other. Without one, only instances of this host are talked to."""
    connector_extra_config: Annotated[
        Mapping[str, Any],
        Option("Settings that only the connector understands, as a JSON object.", json='{"depth":3}', unset="none"),
    ] = field(default_factory=dict)
    """As vLLM's ``ec_connector_extra_config``. ``extra_config`` has the classes of chiasm's own connectors."""


class ItemLike(Protocol):
    """One item of a request, as a connector sees it."""

    @property
    def identifier(self) -> str: ...

    @property
    def offset(self) -> int:
        """Index in the prompt of the item's first placeholder token."""

    @property
    def length(self) -> int:
        """Number of prompt tokens from the item's first placeholder to its last, inclusive."""


class RequestLike(Protocol):
    """A request, as a connector sees it."""

    @property
    def request_id(self) -> str: ...

    @property
    def items(self) -> Sequence[ItemLike]: ...


@dataclass(frozen=True)
class ECConnectorMetadata:
    """What one step loads: distinct identifiers, in the order in which they are needed."""

    loads: tuple[str, ...] = ()


@dataclass
class ECConnectorStats:
    """Counters since the connector was made. Seconds are wall-clock time spent inside the connector."""

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

    def __add__(self, other: ECConnectorStats) -> ECConnectorStats:
        """Return what two halves have counted together."""
        return ECConnectorStats(*(mine + others for mine, others in zip(astuple(self), astuple(other), strict=True)))


def check_identifier(identifier: object) -> str:
    """Return ``identifier`` if it is a string of 64 lower-case hex digits. Raises InvalidRequestError otherwise.

    Identifiers come from clients and become part of file names and remote keys, so each must be checked before it is used.
    """
    if isinstance(identifier, str) and _IDENTIFIER.fullmatch(identifier):
        return identifier
    shown = (
        repr(identifier[:_SHOWN_CHARACTERS])[:_SHOWN_CHARACTERS]
        if isinstance(identifier, str)
        else type(identifier).__name__
    )
    raise InvalidRequestError(
        f"The uuid of an image must be exactly 64 lower-case hex digits, not {shown}. Without one, the image is named by its "
        "content.",
        param="uuid",
        code=Code.INVALID_UUID,
    )


class ECConnector(ABC):
    """Base class of all EC connectors. The methods of one role are never called on an object with the other role."""

    plane: ClassVar = "EC"

    def __init__(self, config: ECTransferConfig, role: ECConnectorRole) -> None:
        self.config = config
        self.faults = Faults()
        self.role = role
        self.stats = ECConnectorStats()
        self._metadata: ECConnectorMetadata | None = None
        self._reminders: Lookout | None = None

    def read_extra_config(self, kind: type[_ConfigT]) -> _ConfigT:
        """Return the connector's own settings as ``kind``, a dataclass of its module.

        Raises ConfigurationError, by name, for one that is missing, unknown or of the wrong type.
        """
        return read_extra_config(self.config.connector, self.config.connector_extra_config, kind)

    @property
    def store_stats(self) -> StoreReads | StoreWrites | None:
        """Counters of the store beside the connector, if there is one: of a consumer in the scheduler role, of a producer in
        the worker role."""
        return None

    @property
    def is_producer(self) -> bool:
        return self.config.role in (ECTransferRole.PRODUCER, ECTransferRole.BOTH)

    @property
    def is_consumer(self) -> bool:
        return self.config.role in (ECTransferRole.CONSUMER, ECTransferRole.BOTH)

    def meet(self, other: ECConnector) -> None:
        """Get to know the other half of this connector, if it lives in the same process.

        Called at most once on each half, before anything else.
        """
        return None

    def shutdown(self) -> None:
        """Release all resources. Called at the end in either role, possibly more than once."""
        if self._reminders is not None:
            self._reminders.stop()

    def store_id(self) -> str:
        """Return a name for the place that holds the entries: connectors with the same name see the same entries.

        Called in either role, when an instance starts and by health checks. Returns "" if the place has no name. Raises
        StorageError if it cannot be reached.
        """
        return ""

    @property
    def max_entry_bytes(self) -> int:
        """Size of the largest embedding that the place can hold; larger ones are refused before they are encoded."""
        return self.config.max_bytes

    @property
    def max_received_bytes(self) -> int | None:
        """Size of the largest embedding that this consumer can ever bring in; None if it brings in any that is published.

        Of the scheduler role, from any thread; it stays the same. A request that needs a larger one is refused when it comes,
        and told to raise ``--ec-receive-bytes``.
        """
        return None

    def free_bytes(self) -> int | None:
        """Return the room for entries before any has to go; None if the connector doesn't know. Called from any thread."""
        return None

    def num_unfetched(self) -> int:
        """Return how many entries consumers have yet to fetch from this producer; its instance ends when there are none.

        Called from any thread, many times a second while the instance drains. 0 for a connector whose entries outlive it.
        """
        return 0

    # ---- scheduler role -------------------------------------------------------------------------------------------
    #
    # Called by the thread that schedules, except where another is named.

    def set_wake(self, wake: Wake) -> None:
        """Set what the connector calls whenever a wanted entry has arrived or was lost, so that the scheduler looks again.

        Called at most once, before the first request. If an entry has arrived, its name says that the others need not be asked
        for. By default it is called at intervals until the requests that want entries have finished, for connectors
        that can't tell when an entry arrives.
        """

        def remind(requests: Sequence[str]) -> bool:
            wake()
            return False

        self._reminders = Lookout(remind, name="chiasm-reminders")

    def expect(self, places: Mapping[str, ECPlace], stored: Collection[str] = ()) -> None:
        """Note where embeddings are or will be: ``places`` names their encoders, ``stored`` has what the shared cache has.

        Called from any thread, at any time: before a request wants them, after it, or without any. What is said about an
        identifier replaces what was said before. It comes from the network: identifiers and the lengths of names are checked,
        nothing else is. It must return at once, and bound what it keeps for requests that may never come. Does nothing for a
        connector that finds entries without.
        """
        return None

    @abstractmethod
    def has_cache_item(self, identifier: str) -> bool:
        """Whether the entry can be handed over in this step: of a consumer, it is in memory, verified and ready.

        The scheduler calls it, in the order of need, for the items that it needs next and that are not in its own memory:
        whenever ``wake`` was called without a name or what it needs has changed. An entry that ``wake`` was told of is asked
        for by itself; if it isn't handed over then, all are asked for. So it must take microseconds, create nothing, and wait
        for no lock and no other process. After a yes, the entry stays until ``build_connector_meta``. If memory is short, what
        was asked for first comes first, so that the first request can always continue. Raises InvalidRequestError for a
        malformed identifier.
        """

    def layout_of(self, identifier: str) -> tuple[tuple[int, ...], torch.dtype] | None:
        """Shape and dtype of an entry for which ``has_cache_item`` has returned true; None if the connector doesn't know them.

        vLLM asks, since an entry that doesn't fit would stop its engine: one that is known not to fit is never loaded, and one
        of unknown shape is looked at when it has been loaded. As cheap as ``has_cache_item``.
        """
        return None

    def is_published(self, identifier: str) -> bool:
        """Whether consumers find the entry, so that this producer need not make it. As cheap as ``has_cache_item``.

        Raises InvalidRequestError for a malformed identifier.
        """
        return self.has_cache_item(identifier)

    def is_coming(self, identifier: str) -> bool:
        """Whether a wanted entry is here or on its way, as of some moment after the call.

        If not, it is awaited: the proxy is told when it asks, or at once if a question of it waits for that, and has the item
        encoded again if it was published before.
        Called from any thread but the one that schedules, so it may look into a store. A connector whose ``has_cache_item``
        must not be called from there overrides it. Raises InvalidRequestError for a malformed identifier.
        """
        return self.has_cache_item(identifier)

    def ensure_cache_available(self, request: RequestLike, num_computed_tokens: int) -> bool:
        """Whether every item that ends after the first ``num_computed_tokens`` tokens exists.

        Called once per request, when it is admitted. The request wants these items from now until ``request_finished``. A
        connector that overrides this overrides ``set_wake`` too.
        """
        wanted = [item.identifier for item in request.items if item.offset + item.length > num_computed_tokens]
        if wanted and self._reminders is not None:
            self._reminders.add(request.request_id)
        return all(self.has_cache_item(identifier) for identifier in wanted)

    @abstractmethod
    def update_state_after_alloc(self, request: RequestLike, index: int) -> None:
        """Note that the next step loads item ``index`` of the request, for which there is room in memory now.

        Called after ``has_cache_item`` has returned true. Does nothing unless the connector is a consumer.
        """

    @abstractmethod
    def build_connector_meta(self) -> ECConnectorMetadata:
        """Return everything that was noted since the last call, and forget it. Called once per step."""

    def request_finished(self, request: RequestLike) -> None:
        """Let go of what only this request wanted. Called once for each request that was admitted, however it ended."""
        if self._reminders is not None:
            self._reminders.remove(request.request_id)

    # ---- worker role ----------------------------------------------------------------------------------------------

    def place(self) -> ECPlace | None:
        """Return where consumers find what this producer publishes; None if they find it without, or if the other role says it.

        With ``separate_processes`` it is the scheduler role that is asked. Called from any thread, after the connector was
        made; it returns the same as long as the connector lives.
        """
        return None

    def bind_connector_metadata(self, metadata: ECConnectorMetadata) -> None:
        """Set the metadata of the step that begins."""
        self._metadata = metadata

    def clear_connector_metadata(self) -> None:
        """Forget the metadata of the step."""
        self._metadata = None

    @abstractmethod
    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor]) -> None:
        """Put each entry of the bound metadata into ``encoder_cache`` under its identifier, on ``config.device``.

        Called before the model runs, so it only hands over what is in memory. Skips what is in the dict already. An entry that
        cannot be loaded, because it is gone, damaged or of another model, is left out and counted in ``stats``; no error is
        raised for it, since it must not affect the other requests of the step.
        """

    def discard(self, identifier: str, reason: str) -> None:
        """Remove an entry that was loaded and can't be used, so that a producer doesn't find it and publishes it again.

        ``reason`` is for the log, and goes on from "it was rejected: ". Raises no error if the entry is gone or can't be
        removed. In vLLM the scheduler role is called too, for an entry that it sees not to fit (``layout_of``).
        """
        return None

    def restore(self, identifier: str, rows: int) -> bool:
        """Publish an entry of ``rows`` rows again that was published here and is lost, if it can be had without encoding.

        Called by producers, from any thread, if the entry isn't published and before they encode it. Returns whether consumers
        find it now. Raises StorageError if it cannot be published. A connector without a store beside it has no other place.
        """
        return False

    @abstractmethod
    def save_caches(self, encoder_cache: dict[str, torch.Tensor], mm_hash: str) -> None:
        """Publish ``encoder_cache[mm_hash]``. Once it returns, every consumer finds the entry.

        Called by producers after each encode, from any thread. Does nothing unless the connector is a producer, or if the
        entry exists already. Raises StorageError if the entry cannot be published, for instance because a disk is full.
        """


FROM_MEMORY = ("SharedMemoryConnector", "TcpConnector", "NixlConnector")
"""The connectors that move embeddings from memory to memory."""
RECEIVING = ("TcpConnector", "NixlConnector")
"""Those of them whose consumers receive embeddings in memory of their own, of twice ``receive_bytes``."""


def moves_from_memory(connector: str, module_path: str | None) -> bool:
    """Tell whether the connector of this name is one of ``FROM_MEMORY``, and not one of a user's module."""
    return module_path is None and connector in FROM_MEMORY


class ECConnectorFactory(ConnectorFactory[ECTransferConfig, ECConnectorRole, ECConnector]):
    """Makes the EC connector that a configuration names."""

    _base = ECConnector
    _module_option = "--connector-module-path"
    _registry: ClassVar = {
        "SharedMemoryConnector": ClassPath("chiasm.ec_transfer.shared_memory", "SharedMemoryConnector"),
        "TcpConnector": ClassPath("chiasm.ec_transfer.tcp", "TcpConnector"),
        "NixlConnector": ClassPath("chiasm.ec_transfer.nixl", "NixlConnector"),
        "SharedStorageConnector": ClassPath("chiasm.ec_transfer.shared_storage", "SharedStorageConnector"),
    }

    @classmethod
    def check(cls, config: ECTransferConfig) -> None:
        """Raise ConfigurationError for a connector that doesn't exist, or for settings that one of chiasm's own doesn't have.

        Imports no connector, so it cannot tell everything.
        """
        cls.check_name(config)
        if config.connector_module_path is None and config.connector in EXTRA_CONFIGS:
            read_extra_config(config.connector, config.connector_extra_config, EXTRA_CONFIGS[config.connector])

    @classmethod
    def create_connector(cls, config: ECTransferConfig, role: ECConnectorRole) -> ECConnector:
        """Make one half of the configured connector, with the store beside it if there is one."""
        connector = super().create_connector(config, role)
        if not config.store:
            return connector
        from chiasm.ec_transfer.with_store import WithStore

        return WithStore(config, role, connector)
