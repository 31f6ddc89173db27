"""The connector's counters, in the shapes that vLLM's log line and /metrics want."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prometheus_client import Counter
from vllm.distributed.ec_transfer.ec_connector.metrics import ECConnectorPromMetrics, ECConnectorStats

_PREFIX = "vllm:chiasm_ec_"
_COUNTERS = {
    "hits": "Embeddings taken from the store.",
    "misses": "Embeddings that were not in the store and were encoded here.",
    "waits": "Times that a request had to wait for an embedding.",
    "wait_seconds": "Seconds that requests waited for embeddings.",
    "failed_requests": "Requests that failed because an embedding did not arrive, was unusable or had an invalid name.",
    "saves": "Embeddings written to the store.",
    "saved_bytes": "Bytes of embeddings written to the store.",
    "save_seconds": "Seconds spent writing embeddings.",
    "save_failures": "Embeddings that could not be written.",
    "loads": "Embeddings read from the store.",
    "loaded_bytes": "Bytes of embeddings read from the store.",
    "load_seconds": "Seconds spent reading embeddings.",
    "load_failures": "Embeddings that were found but could not be read.",
    "evictions": "Entries evicted from the store to make room.",
    "evicted_bytes": "Bytes of entries evicted from the store.",
    "corrupt_entries": "Files in the store that were torn, foreign or of another model.",
    "store_reads": "Embeddings read from the shared cache.",
    "store_read_bytes": "Bytes of embeddings read from the shared cache.",
    "store_read_seconds": "Seconds spent reading them.",
    "store_absent": "Embeddings that the shared cache had when the proxy asked, and not when they were read.",
    "store_corrupt": "Values in the shared cache that were not the embedding, or another than a request needs.",
    "store_read_failures": "Reads that failed because the shared cache was down, slow or paused.",
    "store_writes": "Embeddings written to the shared cache.",
    "store_written_bytes": "Bytes of embeddings written to the shared cache.",
    "store_write_failures": "Writes that failed because the shared cache was down, slow or full.",
    "store_dropped": "Embeddings not written, because the queue was full or the shared cache has failed lately.",
}
_MEGABYTES = {"saved_bytes": "saved_MB", "loaded_bytes": "loaded_MB"}
_MILLISECONDS = {
    "save_seconds": ("saves", "save_ms"),
    "load_seconds": ("loads", "load_ms"),
    "wait_seconds": ("waits", "wait_ms"),
}


@dataclass
class ChiasmECStats(ECConnectorStats):  # type: ignore[misc]
    """Counts of an interval, by the names of ``_COUNTERS``; an absent one is 0."""

    def reset(self) -> None:
        self.data: dict[str, Any] = {}

    def is_empty(self) -> bool:
        return not self.data

    def aggregate(self, other: ECConnectorStats) -> ChiasmECStats:
        for name, value in other.data.items():
            self.data[name] = self.data.get(name, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        """Return what the log line shows: counts, megabytes, and the average milliseconds of each operation."""
        data: dict[str, float] = self.data
        line: dict[str, int | float] = {
            name: int(data[name]) for name in _COUNTERS if name in data and not name.endswith(("_bytes", "_seconds"))
        }
        line |= {shown: round(data[name] / 1e6, 3) for name, shown in _MEGABYTES.items() if name in data}
        for name, (times, shown) in _MILLISECONDS.items():
            if data.get(times) and name in data:
                line[shown] = round(data[name] / data[times] * 1e3, 3)
        return line


class ChiasmECPromMetrics(ECConnectorPromMetrics):  # type: ignore[misc]
    """One Prometheus counter for each of ``_COUNTERS`` and each engine."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[type[Any], type[Any]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        counter = metric_types[Counter]
        self._counters: dict[str, dict[int, Any]] = {}
        for name, documentation in _COUNTERS.items():
            family = counter(name=_PREFIX + name, documentation=documentation, labelnames=labelnames)
            self._counters[name] = {engine: family.labels(*values) for engine, values in per_engine_labelvalues.items()}

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, value in transfer_stats_data.items():
            self._counters[name][engine_idx].inc(value)
