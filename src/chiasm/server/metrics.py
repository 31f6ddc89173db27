"""The Prometheus metrics of an instance."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from chiasm import __version__
from chiasm.http.limits import Refusals

if TYPE_CHECKING:
    from chiasm.engine.base import Engine
    from chiasm.engine.request import EngineStats

_TTFT_BUCKETS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5, 10, 20, 40, 80)
_ITL_BUCKETS = (0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.12, 0.25, 0.5, 1, 2, 5)
_E2E_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Scraped(Protocol):
    """The instance whose state is shown: :class:`chiasm.server.context.ServerContext`."""

    model: str
    loaded_engine: Engine | None

    @property
    def state(self) -> str: ...


class Metrics:
    """The registry of one instance, and the metrics of its HTTP API."""

    def __init__(self, instance: Scraped) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "chiasm_http_requests",
            "Requests answered, by path and status (499: the client left first).",
            ("path", "status"),
            registry=self.registry,
        )
        self.in_flight = Gauge("chiasm_http_requests_in_flight", "Requests being answered.", registry=self.registry)
        self.stream_errors = Counter(
            "chiasm_stream_errors", "Streams that ended with an error event.", registry=self.registry
        )
        self.first_token = Histogram(
            "chiasm_time_to_first_token_seconds",
            "Time from the arrival of a request to its first output.",
            buckets=_TTFT_BUCKETS,
            registry=self.registry,
        )
        self.inter_token = Histogram(
            "chiasm_inter_token_seconds",
            "Time between two tokens of a choice.",
            buckets=_ITL_BUCKETS,
            registry=self.registry,
        )
        self.end_to_end = Histogram(
            "chiasm_request_seconds",
            "Time from the arrival of a request to the end of its response.",
            ("path",),
            buckets=_E2E_BUCKETS,
            registry=self.registry,
        )
        self.refusals = Refusals(self.registry)
        self.registry.register(_InstanceCollector(instance))
        ProcessCollector(namespace="chiasm", registry=self.registry)

    def expose(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class _InstanceCollector(Collector):
    """The state of the instance and the counters of its engine, read at each scrape."""

    def __init__(self, instance: Scraped) -> None:
        self._instance = instance

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        instance = self._instance
        yield GaugeMetricFamily("chiasm_up", "1 if the instance takes requests, otherwise 0.", instance.state == "ok")
        engine = instance.loaded_engine
        if engine is None:
            return
        labels = {
            "model": instance.model,
            "role": str(engine.config.role),
            "fingerprint": engine.model_fingerprint,
            "version": __version__,
        }
        yield InfoMetricFamily("chiasm_instance", "Model, role and version of the instance.", labels)
        yield from _engine_metrics(engine.stats())


def _engine_metrics(stats: EngineStats) -> Iterator[Metric]:
    for name, help_text, value in (
        ("requests_running", "Requests that the engine is computing.", stats.num_running),
        ("requests_waiting", "Requests that wait for a place in the engine.", stats.num_waiting),
        ("requests_stalled", "Requests that wait for an embedding.", stats.num_stalled),
        ("kv_blocks", "Blocks of the KV cache.", stats.kv_blocks_total),
        ("kv_blocks_used", "Blocks of the KV cache that requests hold.", stats.kv_blocks_used),
        ("encoder_cache_bytes", "Size of the embeddings held in memory.", stats.encoder_cache_bytes),
    ):
        yield GaugeMetricFamily(f"chiasm_{name}", help_text, value)
    for name, help_text, count in (
        ("prefix_cache_query_tokens", "Prompt tokens looked up in the prefix cache.", stats.prefix_cache_query_tokens),
        ("prefix_cache_hit_tokens", "Prompt tokens found in the prefix cache.", stats.prefix_cache_hit_tokens),
        ("prompt_tokens", "Prompt tokens of admitted requests.", stats.prompt_tokens),
        ("generation_tokens", "Tokens generated.", stats.generation_tokens),
        ("preemptions", "Times that a request lost its KV blocks and was computed again.", stats.preemptions),
        ("item_wait_seconds", "Time that requests waited for embeddings.", stats.item_wait_seconds),
        ("images_encoded", "Images encoded by this instance.", stats.images_encoded),
        ("encode_seconds", "Time spent encoding images.", stats.encode_seconds),
    ):
        yield CounterMetricFamily(f"chiasm_{name}", help_text, count)
    items = CounterMetricFamily("chiasm_items", "Items, by how their embedding became usable.", labels=("outcome",))
    for outcome, number in stats.items.items():
        items.add_metric((str(outcome),), number)
    yield items
    if stats.ec is not None:
        for field in dataclasses.fields(stats.ec):
            yield _connector_metric("ec", CounterMetricFamily, field.name, getattr(stats.ec, field.name))
    if stats.ec_store is not None:
        for field in dataclasses.fields(stats.ec_store):
            gauge = field.name == "queued_bytes"
            family_of_store = GaugeMetricFamily if gauge else CounterMetricFamily
            yield _connector_metric("ec_store", family_of_store, field.name, getattr(stats.ec_store, field.name))
    if stats.kv is not None:
        for field in dataclasses.fields(stats.kv):
            family = GaugeMetricFamily if field.name == "leases_held" else CounterMetricFamily
            yield _connector_metric("kv", family, field.name, getattr(stats.kv, field.name))


def _connector_metric(
    plane: str, family: type[CounterMetricFamily] | type[GaugeMetricFamily], name: str, value: float
) -> Metric:
    what = "Shared cache of embeddings" if plane == "ec_store" else f"{plane.upper()} connector"
    return family(f"chiasm_{plane}_{name}", f"{what}: {name.replace('_', ' ')}.", value)
