"""What the proxy counts. One registry per proxy; labels take few values, none of them from a client."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from chiasm.proxy.fleet import Fleet
from chiasm.wire import InstanceState

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_OVERHEAD_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5)
_GAP_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_FETCH_BUCKETS = (0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class Metrics:
    """Counters, gauges and histograms of one proxy, and the fleet's figures at the time of a scrape."""

    def __init__(self, fleet: Fleet) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "chiasm_proxy_requests",
            "Requests answered, by route and HTTP status",
            ["route", "status"],
            registry=self.registry,
        )
        self.in_flight = Gauge("chiasm_proxy_requests_in_flight", "Requests being answered", registry=self.registry)
        self.items = Counter(
            "chiasm_proxy_items",
            "Media items by outcome: encoded, joined (an encode of the same item under way), refused, failed",
            ["outcome"],
            registry=self.registry,
        )
        self.encode_retries = Counter(
            "chiasm_proxy_encode_retries", "Items sent to another encoder after a failure", registry=self.registry
        )
        self.language_retries = Counter(
            "chiasm_proxy_language_retries",
            "Requests sent to another PD after a lost connection",
            registry=self.registry,
        )
        self.prefill_retries = Counter(
            "chiasm_proxy_prefill_retries",
            "Requests prefilled again, whatever the reason",
            registry=self.registry,
        )
        self.resumed_streams = Counter(
            "chiasm_proxy_resumed_streams",
            "Those whose client had a part of the answer; reason: prefill_lost, decode_lost, kv_unavailable, preempted",
            ["reason"],
            registry=self.registry,
        )
        self.handovers = Counter(
            "chiasm_proxy_handovers", "Requests that a decode instance took over", registry=self.registry
        )
        self.decode_refusals = Counter(
            "chiasm_proxy_decode_refusals", "Calls that a full decode instance refused", registry=self.registry
        )
        self.gap = Histogram(
            "chiasm_proxy_handover_gap_seconds",
            "Time between the first token of prefill and the next, of decode, in a stream",
            buckets=_GAP_BUCKETS,
            registry=self.registry,
        )
        self.overhead = Histogram(
            "chiasm_proxy_overhead_seconds",
            "The proxy's own time from a body's last byte to the call of an instance, without fetching media",
            ["kind"],
            buckets=_OVERHEAD_BUCKETS,
            registry=self.registry,
        )
        self.fetch = Histogram(
            "chiasm_proxy_fetch_seconds",
            "Time to fetch a request's media",
            buckets=_FETCH_BUCKETS,
            registry=self.registry,
        )
        self.encode = Histogram(
            "chiasm_proxy_encode_seconds",
            "Time until all encoders of a request have answered",
            buckets=_FETCH_BUCKETS,
            registry=self.registry,
        )
        self.registry.register(_FleetCollector(fleet))
        ProcessCollector(registry=self.registry)

    def render(self) -> bytes:
        return generate_latest(self.registry)


class _FleetCollector(Collector):
    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterable[GaugeMetricFamily]:
        return self._families()

    def _families(self) -> Iterator[GaugeMetricFamily]:
        labels = ["url", "role"]
        healthy = GaugeMetricFamily("chiasm_proxy_instance_healthy", "1 if requests may go to it", labels=labels)
        work = GaugeMetricFamily(
            "chiasm_proxy_instance_outstanding_work",
            "Pixels at an encoder; calls at a decode instance; bytes of text, and what media stands for, at the others",
            labels=labels,
        )
        calls = GaugeMetricFamily("chiasm_proxy_instance_calls_in_flight", "Calls under way", labels=labels)
        for instance in self._fleet.instances:
            values = [instance.url, instance.role.value]
            healthy.add_metric(values, float(instance.state is InstanceState.HEALTHY))
            work.add_metric(values, instance.outstanding)
            calls.add_metric(values, instance.in_flight)
        yield from (healthy, work, calls)
