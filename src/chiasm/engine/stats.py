"""Counters and gauges of an engine, read by the server's metrics."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from chiasm.engine.request import ItemOutcome

if TYPE_CHECKING:
    from chiasm.ec_transfer import ECConnectorStats
    from chiasm.kv_transfer import KVConnectorStats


@dataclass(frozen=True)
class EngineStats:
    """A snapshot. Counters run since start; what does not apply to a role stays 0."""

    num_running: int = 0
    num_waiting: int = 0
    num_stalled: int = 0
    """Requests that wait for an embedding."""
    kv_blocks_total: int = 0
    kv_blocks_used: int = 0
    prefix_cache_query_tokens: int = 0
    prefix_cache_hit_tokens: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    preemptions: int = 0
    items: dict[ItemOutcome, int] = field(default_factory=dict)
    item_wait_seconds: float = 0.0
    encoder_cache_bytes: int = 0
    images_encoded: int = 0
    encode_seconds: float = 0.0
    ec: ECConnectorStats | None = None
    kv: KVConnectorStats | None = None
