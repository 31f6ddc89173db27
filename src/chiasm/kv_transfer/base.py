"""The interface of KV connectors, which move the attention cache (KV) of a prompt from the prefill to the decode instance.

P (prefill) computes the keys and values of a prompt, samples one token and returns a *handle*
(:class:`~chiasm.wire.KVTransferParams`), which says where the blocks are and what has been generated so far. D (decode) gets
the handle, claims the blocks, pulls those that it doesn't have into blocks of its own, gives P's back, and continues the
answer. P holds the blocks until then: unclaimed ones until their lease ends, claimed ones while D's connection lives, but no
longer than the deadline of D's request.

A connector consists of two halves, and an instance creates one of each. The *scheduler role* lives where requests are
scheduled and never touches memory; the *worker role* owns the memory and knows no requests. The metadata of one step passes
from the first to the second. ``claim``, ``leave``, ``give_back`` and ``drop`` are chiasm's own; the other methods have the
names that vLLM's ``KVConnectorBase_V1`` gives to the same hooks::

    scheduler role                                     worker role
    -------------------------------------------------  -----------------------------------------------
                                                       allocate_kv_cache, register_kv_caches   (once)
    set_xfer_handshake_metadata  (once)           <-   get_handshake_metadata                  (once)
    claim                        (D: a request came)
    update_state_after_alloc     (D: it has its blocks)
    leave                        (P: D continues it)
    give_back                    (P: no D will)
    drop                         (P and D: it ended)
    build_connector_meta         (after any of these)  ->   start_load_kv
                                                       get_finished                     (before each step)

P does nothing on behalf of D, and D asks P for nothing but permission, so a transfer costs P's engine thread no time.

If a method raises an error that it shouldn't, the engine logs it, and the KV of the request that the call was for counts as
lost: the request fails, and its prompt may be prefilled again. Other requests run on. ``get_finished`` is for no single
request: if it raises an error, this costs D's requests that wait for KV.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple, Protocol, TypeVar

from chiasm.connectors.extra_config import read_extra_config
from chiasm.connectors.factory import ClassPath, ConnectorFactory
from chiasm.connectors.faults import Faults
from chiasm.errors import ConfigurationError
from chiasm.fleet_key import FleetKey
from chiasm.options import Option
from chiasm.wire import KVTransferParams

if TYPE_CHECKING:
    import torch

_ConfigT = TypeVar("_ConfigT")


class KVConnectorRole(enum.Enum):
    """Which half of a connector an object is."""

    SCHEDULER = "scheduler"
    WORKER = "worker"


class KVTransferRole(enum.Enum):
    """What an instance does with KV: a prefill instance produces it, a decode instance consumes it."""

    PRODUCER = "kv_producer"
    CONSUMER = "kv_consumer"


@dataclass(frozen=True)
class KVTransferConfig:
    """The configuration of both halves of a connector.

    ``engine_id`` identifies this process. ``fingerprint`` (hex) identifies model, processor and dtype; KV with another
    fingerprint is refused. A producer listens on ``port`` (0 takes a free one) of ``host``, the name or address under which
    decode instances reach it; a consumer uses neither. ``device`` is where the KV cache is (``"cpu"``, ``"cuda:0"``).
    """

    connector: Annotated[str, Option("Connector that transfers the KV cache.", name="kv_connector", metavar="NAME")] = (
        "SharedMemoryConnector"
    )
    role: KVTransferRole = KVTransferRole.PRODUCER
    engine_id: str = ""
    fingerprint: str = ""
    device: str = "cpu"
    host: Annotated[
        str,
        Option(
            "Address at which decode instances reach this prefill instance (also its bind address).", name="kv_host"
        ),
    ] = "127.0.0.1"
    port: Annotated[int, Option("Port at that address; 0 takes a free one.", name="kv_port", min=0, max=65535)] = 0
    lease_seconds: Annotated[
        float, Option("How long a prefill instance holds KV that nobody claims.", name="kv_lease_seconds", min=1)
    ] = 30.0
    connect_timeout_seconds: float = 3.0
    """How long a producer may take to accept a connection, and to answer a question."""
    max_parallel_transfers: int = 4
    """How many loads a consumer copies at the same time; further ones wait for their turn."""
    connector_module_path: Annotated[
        str | None,
        Option(
            "Python module of a KV connector that isn't chiasm's own.",
            name="kv_connector_module_path",
            metavar="MODULE",
        ),
    ] = None
    fleet_key: FleetKey | None = field(default=None, repr=False)
    """By which the instances of a fleet know each other. Without one, only instances of this host are talked to."""
    connector_extra_config: Annotated[
        Mapping[str, Any],
        Option(
            "Settings that only the KV connector understands, as a JSON object.",
            name="kv_connector_extra_config",
            json='{"depth":3}',
            unset="none",
        ),
    ] = field(default_factory=dict)
    """As vLLM's ``kv_connector_extra_config``. Chiasm's own connectors have no such settings: they share those above."""


@dataclass(frozen=True)
class KVLayout:
    """The layout of a block. Two instances can exchange blocks if their layouts are equal.

    A block is ``bytes_per_block`` contiguous bytes: ``[num_layers, block_size, 2 (key, value), num_kv_heads, head_dim]``.
    """

    num_layers: int
    block_size: int
    """Tokens."""
    num_kv_heads: int
    head_dim: int
    dtype: str
    """Torch's name without ``torch.``, such as ``float32``."""
    bytes_per_block: int


class KVRequestLike(Protocol):
    """What a connector needs to know about a request."""

    @property
    def request_id(self) -> str: ...

    @property
    def num_choices(self) -> int:
        """How many loads a consumer will ask for: one for each continuation of the prompt."""

    @property
    def deadline(self) -> float:
        """``time.monotonic()`` at which the request fails."""

    @property
    def kv_transfer_params(self) -> KVTransferParams | None:
        """The handle that came with the request."""


class KVClaim(NamedTuple):
    """Consumer: have the producer hold the blocks of a request from now on."""

    request_id: str
    params: KVTransferParams
    num_loads: int
    deadline: float


@dataclass(frozen=True)
class KVLoad:
    """Consumer: copy the producer's block ``remote[i]`` to block ``local[i]`` of this instance."""

    request_id: str
    index: int
    """Which of the request's loads this is, from 0."""
    local: tuple[int, ...]
    remote: tuple[int, ...]

    @property
    def key(self) -> tuple[str, int]:
        """How :class:`FinishedTransfers` names the load."""
        return self.request_id, self.index


class KVSend(NamedTuple):
    """Producer: hold these blocks for the consumer that gets the handle."""

    request_id: str
    block_ids: tuple[int, ...]


@dataclass
class KVConnectorMetadata:
    """What the worker role has to begin: sends and claims first, then loads, then what is given back, then drops."""

    sends: list[KVSend] = field(default_factory=list)
    claims: list[KVClaim] = field(default_factory=list)
    loads: list[KVLoad] = field(default_factory=list)
    given_back: list[str] = field(default_factory=list)
    """Producer: requests whose blocks nobody will come for."""
    dropped: list[str] = field(default_factory=list)
    """Consumer: requests that ended. Their transfers are broken off, and the producer's blocks are given back."""

    def __bool__(self) -> bool:
        return bool(self.sends or self.claims or self.loads or self.given_back or self.dropped)


@dataclass
class FinishedTransfers:
    """What has ended since the last call."""

    sent: set[str] = field(default_factory=set)
    """Producer: requests whose blocks nobody reads any more, because they were fetched or because the lease ended."""
    loaded: set[tuple[str, int]] = field(default_factory=set)
    """Consumer: loads (request id, index) whose blocks are complete."""
    broken_off: set[tuple[str, int]] = field(default_factory=set)
    """Consumer: loads of failed or dropped requests. Nothing writes to their blocks any more."""
    failed: dict[str, str] = field(default_factory=dict)
    """Consumer: requests whose KV could not be fetched, with the reason (a sentence for the client). Each is reported
    once. The loads of a failed request appear in ``broken_off``, at the same time or later."""


@dataclass
class KVConnectorStats:
    """Counters since the worker role was created, and what is held now. Seconds are wall time."""

    transfers: int = 0
    transferred_bytes: int = 0
    transfer_seconds: float = 0.0
    """The sum over all transfers of the time from the first to the last byte."""
    claim_seconds: float = 0.0
    """Consumer: the sum over all requests of the time from arrival until the producer granted the claim."""
    failures: int = 0
    leases_held: int = 0
    """Producer: requests whose blocks are held now."""
    leases_expired: int = 0
    """Producer: leases that ended before a claim, and claims whose deadline passed or whose connection broke."""


class KVConnector(ABC):
    """Base of all KV connectors. Methods of one role are never called on an object of the other."""

    plane: ClassVar = "KV"

    def __init__(self, config: KVTransferConfig, role: KVConnectorRole) -> None:
        self.config = config
        self.faults = Faults()
        self.role = role
        self.stats = KVConnectorStats()

    def read_extra_config(self, kind: type[_ConfigT]) -> _ConfigT:
        """Return the connector's own settings as ``kind``, a dataclass of its module.

        Raises ConfigurationError, by name, for one that is missing, unknown or of the wrong type.
        """
        return read_extra_config(self.config.connector, self.config.connector_extra_config, kind)

    @property
    def is_producer(self) -> bool:
        return self.config.role is KVTransferRole.PRODUCER

    @property
    def is_consumer(self) -> bool:
        return self.config.role is KVTransferRole.CONSUMER

    def shutdown(self) -> None:
        """Release what the object holds. Called at the end, in either role; idempotent."""
        return None

    # ---- scheduler role: called on the engine's thread, must return at once ---------------------------------------

    @abstractmethod
    def set_xfer_handshake_metadata(self, metadata: dict[str, str | int]) -> None:
        """Take what the worker role's ``get_handshake_metadata`` returned; a producer puts it into its handles."""

    @abstractmethod
    def claim(self, request: KVRequestLike) -> None:
        """Consumer: begin to hold the producer's blocks for a request that came with a handle.

        Called once, when the request comes, so that the blocks are held while it waits for room. Raises KVUnavailableError
        if the handle is not one of this connector.
        """

    @abstractmethod
    def update_state_after_alloc(self, request: KVRequestLike, index: int, blocks: Sequence[tuple[int, int]]) -> None:
        """Consumer: pull ``blocks``, pairs (block here, block at the producer), for choice ``index`` of a claimed request.

        Called once for each choice, when it has its blocks. A load without pairs (everything is here already) counts, and
        ends, like any other.
        """

    @abstractmethod
    def leave(self, request: KVRequestLike, block_ids: Sequence[int]) -> KVTransferParams:
        """Producer: begin to hold the blocks (at least one) of a computed prompt that another instance continues.

        Returns the handle, with the ``remote_`` fields set. The blocks must stay untouched until ``get_finished`` names
        the request in ``sent``.
        """

    def give_back(self, request_id: str) -> None:
        """Producer: end the lease of a request that was left, because nobody will come for its blocks.

        Blocks that a consumer has claimed stay with it. A connector that does nothing here holds them until the lease ends.
        """
        return None

    @abstractmethod
    def drop(self, request: KVRequestLike) -> None:
        """Forget a request that ended here, for whatever reason. Called once for each, except those that were left.

        Consumer: the transfers of a claimed request are broken off. Once each load that was begun has been named in
        ``loaded`` or ``broken_off``, its blocks may be used again.
        """

    @abstractmethod
    def build_connector_meta(self) -> KVConnectorMetadata:
        """Return everything that was noted since the last call, and forget it.

        Engines pass on no load for which ``update_state_after_alloc`` or this method has raised an error.
        """

    # ---- worker role: called on the engine's thread; none of them waits for the network or a copy -------------------

    @abstractmethod
    def allocate_kv_cache(self, num_bytes: int) -> torch.Tensor | None:
        """Return memory for the KV cache, zeroed uint8 ``[num_bytes]``; None if it may lie anywhere."""

    @abstractmethod
    def register_kv_caches(self, blocks: torch.Tensor, layout: KVLayout, wake: Callable[[], None]) -> None:
        """Take the KV cache, uint8 ``[num_blocks, bytes_per_block]``, contiguous on the config's device, at a fixed place.

        ``wake`` may be called from any thread when ``get_finished`` has something new. A producer listens from now on.
        Raises ConfigurationError if that is impossible (a port in use, a device that the connector can't reach).
        """

    @abstractmethod
    def get_handshake_metadata(self) -> dict[str, str | int]:
        """Return what the scheduler role needs to know: ``host`` and ``port`` of a producer, nothing of a consumer."""

    @abstractmethod
    def start_load_kv(self, metadata: KVConnectorMetadata) -> None:
        """Begin what the metadata says.

        If it raises an error, the engine drops the requests of the metadata. Loads that have begun in spite of it are named in
        ``broken_off`` or ``loaded`` within 30 seconds, and nothing writes to their blocks after that time.
        """

    @abstractmethod
    def get_finished(self) -> FinishedTransfers:
        """Return what has ended since the last call. Cheap if nothing has.

        After an error, a later call names what had ended: until then, a producer's blocks are held. Blocks of loads are free
        30 seconds after the error in any case.
        """


OWN_CONNECTORS = {
    "SharedMemoryConnector": ClassPath("chiasm.kv_transfer.shared_memory", "SharedMemoryConnector"),
    "TcpConnector": ClassPath("chiasm.kv_transfer.tcp", "TcpConnector"),
    "NixlConnector": ClassPath("chiasm.kv_transfer.nixl", "NixlConnector"),
}
"""The connectors that come with chiasm."""


class KVConnectorFactory(ConnectorFactory[KVTransferConfig, KVConnectorRole, KVConnector]):
    """Creates the KV connector that a configuration names, and imports its module only then."""

    _base = KVConnector
    _module_option = "--kv-connector-module-path"
    _registry: ClassVar = dict(OWN_CONNECTORS)

    @classmethod
    def check(cls, config: KVTransferConfig) -> None:
        """Raise ConfigurationError for a connector that doesn't exist, or for settings that chiasm's own don't have.

        Imports no connector, so it cannot tell everything.
        """
        cls.check_name(config)
        is_own = config.connector_module_path is None and config.connector in OWN_CONNECTORS
        if is_own and (names := ", ".join(sorted(config.connector_extra_config))):
            raise ConfigurationError(
                f"{config.connector} has no settings of its own; leave out {names} (--kv-connector-extra-config)."
            )
