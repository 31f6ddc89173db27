"""The KV connector: what moves the attention cache of a prompt from the instance that prefilled it to the one that decodes.

P (prefill) computes a prompt's keys and values, samples one token and answers with a *handle*
(:class:`~chiasm.wire.KVTransferParams`): where the blocks lie, and what came of the prompt so far. D (decode)
takes the handle, claims the blocks, pulls those that it lacks into blocks of its own, says that it is done, and goes on. P
holds the blocks until then: unclaimed ones for the lease, claimed ones as long as D's connection lives and its deadline
has not passed.

A connector has two halves, and an instance makes one of each. The *scheduler role* runs where requests are scheduled and
knows no memory; the *worker role* knows the memory and no requests. What passes from the first to the second is the metadata
of one step. Names are those of vLLM's ``KVConnectorBase_V1``::

    scheduler role                                   worker role
    -----------------------------------------------  -------------------------------------------------
                                                     allocate_kv_cache, register_kv_caches   (once)
    set_xfer_handshake_metadata  (once)         <-   get_handshake_metadata                  (once)
    get_num_new_matched_tokens   (D, request came)
    update_state_after_alloc     (D, has its blocks)
    request_finished             (P and D, at its end)
    build_connector_meta         (when noted)   ->   start_load_kv
                                                     get_finished            (before each step)

P computes nothing on D's behalf and D asks P for nothing but permission, so a transfer costs P's engine thread no time.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, NamedTuple, Protocol

from chiasm.options import Option
from chiasm.wire import KVTransferParams

if TYPE_CHECKING:
    import torch


class KVConnectorRole(enum.Enum):
    """Which half of a connector an object is."""

    SCHEDULER = "scheduler"
    WORKER = "worker"


class KVTransferRole(enum.Enum):
    """What an instance does with KV: a prefill instance produces, a decode instance consumes."""

    PRODUCER = "kv_producer"
    CONSUMER = "kv_consumer"


@dataclass(frozen=True)
class KVTransferConfig:
    """What both halves of a connector are made from.

    ``engine_id`` names this process and no other; ``fingerprint`` (hex) names model, processor and dtype: KV of another one
    is refused. ``host`` is the name or address under which decode instances reach this prefill instance, ``port`` where it
    listens (0 takes a free one); a consumer uses neither. ``device`` is where the KV cache is (``"cpu"``, ``"cuda:0"``).
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
    """For a producer to accept a connection, and to answer a question."""
    max_parallel_transfers: int = 4
    """Requests whose blocks a consumer pulls at the same time; others wait for their turn."""
    connector_module_path: Annotated[
        str | None,
        Option(
            "Python module of a KV connector that isn't chiasm's own.",
            name="kv_connector_module_path",
            metavar="MODULE",
        ),
    ] = None
    extra: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class KVLayout:
    """What one block is. Two instances can exchange blocks if theirs are equal.

    A block is ``bytes_per_block`` bytes in one piece: ``[num_layers, 2 (keys, values), block_size, num_kv_heads, head_dim]``.
    """

    num_layers: int
    block_size: int
    """Tokens."""
    num_kv_heads: int
    head_dim: int
    dtype: str
    """As torch names it, without ``torch.``."""
    bytes_per_block: int


class KVRequestLike(Protocol):
    """A request, as a connector sees it."""

    @property
    def request_id(self) -> str: ...

    @property
    def num_choices(self) -> int:
        """Loads that a consumer will ask for: one for each continuation of the prompt."""

    @property
    def deadline(self) -> float:
        """``time.monotonic()`` at which the request fails."""

    @property
    def kv_transfer_params(self) -> KVTransferParams | None:
        """What came with the request."""


class KVClaim(NamedTuple):
    """Consumer: a request came; its blocks at the producer are to be held from now on."""

    request_id: str
    params: KVTransferParams
    num_loads: int
    deadline: float


@dataclass(frozen=True)
class KVLoad:
    """Consumer: blocks to pull, ``remote[i]`` of the producer into ``local[i]`` of this instance."""

    request_id: str
    index: int
    """Which of the request's loads, from 0."""
    local: tuple[int, ...]
    remote: tuple[int, ...]


class KVSend(NamedTuple):
    """Producer: blocks to hold for whoever comes with the handle."""

    request_id: str
    block_ids: tuple[int, ...]


@dataclass(frozen=True)
class KVConnectorMetadata:
    """What the worker is to begin: sends and claims first, then loads, then what is dropped."""

    sends: tuple[KVSend, ...] = ()
    claims: tuple[KVClaim, ...] = ()
    loads: tuple[KVLoad, ...] = ()
    dropped: tuple[str, ...] = ()
    """Consumer: requests that ended. What still runs for them is broken off, and the producer's blocks are given back."""

    def __bool__(self) -> bool:
        return bool(self.sends or self.claims or self.loads or self.dropped)


@dataclass
class FinishedTransfers:
    """What came to an end since the last call."""

    sent: set[str] = field(default_factory=set)
    """Producer: requests whose blocks nobody reads any more, whether they were fetched or the lease ran out."""
    loaded: set[tuple[str, int]] = field(default_factory=set)
    """Consumer: loads (request id, index) whose blocks are here, whole."""
    broken_off: set[tuple[str, int]] = field(default_factory=set)
    """Consumer: loads of failed or dropped requests that write into no block any more."""
    failed: dict[str, str] = field(default_factory=dict)
    """Consumer: requests whose KV cannot be had, and why (a sentence for the client). Each is told once; loads of it
    that had begun are in ``broken_off`` by then or will be."""


@dataclass
class KVConnectorStats:
    """Counters since the worker was made, and what is held now. Seconds are wall time."""

    transfers: int = 0
    transferred_bytes: int = 0
    transfer_seconds: float = 0.0
    """From the first to the last byte of each transfer, added up."""
    claim_seconds: float = 0.0
    """Consumer: from a request's arrival to the producer's permission, added up."""
    failures: int = 0
    leases_held: int = 0
    """Producer: requests whose blocks are held now."""
    leases_expired: int = 0
    """Producer: leases that ran out before anybody came, and claims whose deadline passed or whose connection broke."""


class KVConnector(ABC):
    """Base of all KV connectors. Methods of one role are never called on an object of the other."""

    def __init__(self, config: KVTransferConfig, role: KVConnectorRole) -> None:
        self.config = config
        self.role = role
        self.stats = KVConnectorStats()

    @property
    def is_producer(self) -> bool:
        return self.config.role is KVTransferRole.PRODUCER

    @property
    def is_consumer(self) -> bool:
        return self.config.role is KVTransferRole.CONSUMER

    def shutdown(self) -> None:
        """Release what the object holds. Called once, at the end, in either role; idempotent."""
        return None

    # ---- scheduler role: called on the engine's thread, must return at once ---------------------------------------

    @abstractmethod
    def set_xfer_handshake_metadata(self, metadata: dict[str, str | int]) -> None:
        """What the worker's ``get_handshake_metadata`` said: what this instance's handles carry."""

    @abstractmethod
    def get_num_new_matched_tokens(self, request: KVRequestLike, num_computed_tokens: int) -> int:
        """How many tokens beyond ``num_computed_tokens`` the request's handle stands for; 0 without a handle.

        Called once, when the request comes. The connector notes the claim: the producer's blocks are to be held while the
        request waits for room here. Raises KVUnavailableError for a handle that can't be this connector's.
        """

    @abstractmethod
    def update_state_after_alloc(self, request: KVRequestLike, index: int, blocks: Sequence[tuple[int, int]]) -> None:
        """Choice ``index`` of the request has its blocks; pull ``blocks``, pairs (block here, block at the producer).

        No pairs: everything is here already. The load counts and ends all the same.
        """

    @abstractmethod
    def request_finished(
        self, request: KVRequestLike, block_ids: Sequence[int]
    ) -> tuple[bool, KVTransferParams | None]:
        """The request ended here, for whatever reason. Called once for each.

        Producer: with ``block_ids`` (not empty) its prompt is computed and goes on elsewhere. Returns True, the blocks
        must stay untouched until ``get_finished`` names the request in ``sent``, and the handle with the ``remote_``
        fields set. Without them it returns (False, None). Consumer: returns (False, None) and notes that the request is
        dropped; once each load that was begun has been named in ``loaded`` or ``broken_off``, its blocks may be used
        again.
        """

    @abstractmethod
    def build_connector_meta(self) -> KVConnectorMetadata:
        """Everything that was noted since the last call, which it then forgets."""

    # ---- worker role: called on the engine's thread; none of them waits for the network or a copy -------------------

    @abstractmethod
    def allocate_kv_cache(self, num_bytes: int) -> torch.Tensor | None:
        """Memory for the KV cache, zeroed uint8 ``[num_bytes]``, where it has to lie somewhere special; else None."""

    @abstractmethod
    def register_kv_caches(self, blocks: torch.Tensor, layout: KVLayout, wake: Callable[[], None]) -> None:
        """The KV cache, uint8 ``[num_blocks, bytes_per_block]``, contiguous on the config's device, written in place for ever.

        ``wake`` may be called from any thread when ``get_finished`` has something new. A producer listens from now on.
        Raises ConfigurationError when it can't (a port in use, a device that it can't reach).
        """

    @abstractmethod
    def get_handshake_metadata(self) -> dict[str, str | int]:
        """What the scheduler role needs of the worker: ``host`` and ``port`` of a producer, nothing of a consumer."""

    @abstractmethod
    def start_load_kv(self, metadata: KVConnectorMetadata) -> None:
        """Begin what the metadata says; returns at once."""

    @abstractmethod
    def get_finished(self) -> FinishedTransfers:
        """What came to an end since the last call. Cheap when there is nothing."""
