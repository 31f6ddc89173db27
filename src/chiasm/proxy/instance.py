"""One instance behind the proxy: what it last said, and what is under way at it. State only: no clock and no I/O."""

from __future__ import annotations

from msgspec import UNSET

from chiasm.proxy.costs import InstanceCosts
from chiasm.proxy.prompts import Prompts
from chiasm.wire import (
    DRAINING,
    ECPlace,
    Health,
    InstanceInfo,
    InstanceState,
    Lease,
    Load,
    Role,
)

_USUAL_SEQUENCES = 256
"""Sequences that a decode instance is assumed to compute at the same time if it doesn't report a limit."""
_FULL = 10.0
"""Added to the load of a full decode instance: more than the load of any that has room."""


class Instance:
    """One instance, known by its URL. Compared by identity."""

    def __init__(self, url: str, role: Role, number: int = 0) -> None:
        self.url = url
        self.role = role
        self.number = number
        """Names it to clients, who don't see its URL."""
        self.health: Health | None = None
        """What it last said; kept when it becomes unreachable."""
        self.models: tuple[str, ...] = ()
        """Names that it serves, the model's own first."""
        self.failure: str | None = "not probed yet"
        """Why the last probe or connection failed."""
        self.mismatch: str | None = None
        """Why it doesn't fit the fleet."""
        self.costs = InstanceCosts()
        self.prompts = Prompts()
        """Of a language instance: what it has to compute before a new prompt."""
        self.draining = False
        """Whether it is being removed."""
        self.says_draining = False
        """Whether it says itself that it takes no new work."""
        self.is_ending = False
        """Whether what lists it says that it ends."""
        self.sources: tuple[str, ...] = ()
        """What says that it belongs to the fleet."""
        self.incarnation = ""
        """The process that answered the last probe; empty if it doesn't say."""
        self.lease: Lease | None = None
        """What it said last with its lease; None if it holds none."""
        self.lease_fault: str | None = None
        """Why its lease doesn't count, if only a lease says that it belongs to the fleet."""
        self.said_load: Load | None = None
        """What it last said about its load."""
        self.seen_healthy = False
        self.outstanding = 0.0
        """Estimated seconds of the calls under way; of a decode instance, their number."""
        self.in_flight = 0
        self.last_taken = 0
        self.is_silent = False
        """Whether it is unhealthy because it hasn't responded at all: it may be frozen."""
        self.says_starting = False
        """Whether it isn't healthy and says that it is starting."""
        self.lost_at: float | None = None
        """Since when it can't be reached or says that it isn't healthy, or since when it has drained; None while it can be."""
        self.reported_at = 0
        self.moved_at = 0
        """See :class:`Member` for these two."""
        self.told: tuple[InstanceState, str | None] = (self.state, None)
        """State and mismatch as listeners know them."""

    @property
    def state(self) -> InstanceState:
        if self.draining or self.is_ending or self.says_draining or (self.lease and self.lease.status == DRAINING):
            return InstanceState.DRAINING
        if self.failure is not None or self.health is None or self.lease_fault is not None:
            return InstanceState.UNHEALTHY if self.seen_healthy else InstanceState.STARTING
        return InstanceState.MISMATCHED if self.mismatch else InstanceState.HEALTHY

    @property
    def device_id(self) -> str:
        """Names the device that it computes on; empty if it doesn't say."""
        return self.health.device_id if self.health else ""

    @property
    def cores(self) -> int:
        """How many instances can compute at once on its device without slowing each other down: 1 on a GPU."""
        return max(1, len(self.health.cpus)) if self.health and self.health.device == "cpu" else 1

    @property
    def ec_place(self) -> ECPlace | None:
        """Where it serves embeddings from its memory; None if it publishes them where all find them."""
        return (self.health.ec_place or None) if self.health else None

    @property
    def encodes(self) -> bool:
        """Whether it encodes images."""
        return self.role in {Role.ENCODER, Role.AGGREGATED}

    @property
    def is_vllm(self) -> bool:
        return self.health is not None and self.health.engine.startswith("vllm")

    @property
    def serves_other_paths(self) -> bool:
        """Whether it may serve more than completions: all but the built-in engine, which tells its version."""
        return self.is_vllm or (self.health is not None and not self.health.version)

    def takes_names_at(self, path: str) -> bool:
        """Whether images in requests to one of the other paths may have names, as those of chats."""
        return self.health is not None and path in self.health.image_paths

    @property
    def load(self) -> float:
        """What balancing compares. Of a decode instance: the shares of its sequences and of its KV blocks that are in use.

        The proxy counts sequences itself, call by call; blocks are as of the last probe.
        """
        if self.role is not Role.DECODE:
            return self.outstanding
        health = self.health or Health()
        limit = health.max_num_seqs or _USUAL_SEQUENCES
        total = health.kv_blocks_total or 0
        free = health.kv_blocks_free if total else None
        blocks = 0.0 if free is None else 1 - free / total
        is_full = self.in_flight >= limit or free == 0
        return self.in_flight / limit + blocks + (_FULL if is_full else 0.0)

    @property
    def reason(self) -> str | None:
        """Why it isn't healthy."""
        return self.failure or self.lease_fault or self.mismatch

    @property
    def address(self) -> str:
        """Its URL without the scheme, as logs and records have it."""
        return self.url.partition("://")[2]

    def describe(self, now: float) -> InstanceInfo:
        """Return what others may know of it; ``now`` is on the clock on which its costs are learned."""
        health = self.health
        return InstanceInfo(
            url=self.url,
            role=self.role,
            state=self.state,
            reason=self.reason,
            model=health.model if health else None,
            version=health.version if health else None,
            engine=(health.engine or None) if health else None,
            outstanding_work=self.outstanding,
            in_flight=self.in_flight,
            number=self.number,
            costs=self.costs.learned(now),
            sources=list(self.sources) or UNSET,
            load=self.said_load or UNSET,
        )
