"""What the connector counts, in the shapes that vLLM's log line and /metrics want."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prometheus_client import Counter
from vllm.distributed.ec_transfer.ec_connector.metrics import ECConnectorPromMetrics, ECConnectorStats

_PREFIX = "vllm:chiasm_ec_"
_COUNTERS = {
    "hits": "Embeddings that were taken from the store.",
    "misses": "Embeddings that were not in the store and were encoded here.",
    "waits": "Times that a request had to wait for an embedding.",
    "wait_seconds": "Seconds that requests have waited for embeddings.",
    "failed_requests": "Requests that were failed since an embedding did not come, was unusable or had a wrong name.",
    "saves": "Embeddings that were written to the store.",
    "saved_bytes": "Bytes of the embeddings that were written to the store.",
    "save_seconds": "Seconds spent writing embeddings.",
    "save_failures": "Embeddings that could not be written.",
    "loads": "Embeddings that were read from the store.",
    "loaded_bytes": "Bytes of the embeddings that were read from the store.",
    "load_seconds": "Seconds spent reading embeddings.",
    "load_failures": "Embeddings that were found and then could not be read.",
    "evictions": "Entries that made room for new ones.",
    "evicted_bytes": "Bytes of the entries that made room for new ones.",
    "corrupt_entries": "Files in the store that were torn, foreign or of another model.",
}


@dataclass
class ChiasmECStats(ECConnectorStats):  # type: ignore[misc]
    """Counts of an interval, by the names of ``_COUNTERS``; what is absent is 0."""

    def reset(self) -> None:
        self.data: dict[str, Any] = {}

    def is_empty(self) -> bool:
        return not self.data

    def aggregate(self, other: ECConnectorStats) -> ChiasmECStats:
        for name, value in other.data.items():
            self.data[name] = self.data.get(name, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        """For the log line: what has happened, with bytes as megabytes and seconds as milliseconds for each time."""
        data: dict[str, float] = self.data
        line: dict[str, int | float] = {
            name: int(data[name]) for name in _COUNTERS if name in data and not name.endswith(("_bytes", "_seconds"))
        }
        for name, of in (("saved_bytes", "saved_MB"), ("loaded_bytes", "loaded_MB")):
            if name in data:
                line[of] = round(data[name] / 1e6, 3)
        for seconds, times, of in (
            ("save_seconds", "saves", "save_ms"),
            ("load_seconds", "loads", "load_ms"),
            ("wait_seconds", "waits", "wait_ms"),
        ):
            if data.get(times) and seconds in data:
                line[of] = round(data[seconds] / data[times] * 1e3, 3)
        return line


class ChiasmECPromMetrics(ECConnectorPromMetrics):  # type: ignore[misc]
    """One Prometheus counter for each of ``_COUNTERS``, for each engine."""

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
