"""The proxy's metrics. Labels take few values, and none of them comes from a client."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from functools import cache, partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from chiasm.http.limits import Refusals
from chiasm.proxy.agreement import LANGUAGE_ROLES
from chiasm.proxy.encode_queue import EncodeQueue
from chiasm.proxy.encoder_demand import DESIRED_METRIC, WINDOWS_SECONDS, EncoderDemand
from chiasm.proxy.fleet import Fleet
from chiasm.wire import InstanceState, Role

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_OVERHEAD_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5)
_GAP_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_RATIO_BUCKETS = (0.1, 0.25, 0.5, 0.7, 0.85, 1, 1.2, 1.5, 2, 4, 10)
_FETCH_BUCKETS = (0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class Metrics:
    """Counters, gauges and histograms of one proxy in a registry of its own, and the fleet's figures at each scrape."""

    def __init__(self, fleet: Fleet) -> None:
        self.registry = CollectorRegistry()
        counter, gauge = partial(Counter, registry=self.registry), partial(Gauge, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)
        self.requests = counter(
            "chiasm_proxy_requests",
            "Requests answered, by route and HTTP status (499: the client left).",
            ["route", "status"],
        )
        self.key_requests = counter(
            "chiasm_proxy_key_requests",
            "The same by the name of the API key and HTTP status, for keys that have a name.",
            ["key", "status"],
        )
        self.in_flight = gauge("chiasm_proxy_requests_in_flight", "Requests being answered.")
        self.items = counter(
            "chiasm_proxy_items",
            "Images by outcome: encoded, joined (waited for the encoding of an equal image), stored (the shared cache had its "
            "embedding), refused, failed.",
            ["outcome"],
        )
        self.items_waiting = gauge("chiasm_proxy_items_waiting", "Images that wait for an encoder with room.")
        self.encode_retries = counter("chiasm_proxy_encode_retries", "Images sent to an encoder again after a failure.")
        self.hedges = counter(
            "chiasm_proxy_hedges",
            "Late calls to encoders whose images went to a second one too, by outcome: won (the second answered first), lost.",
            ["outcome"],
        )
        self.encode_refusals = counter("chiasm_proxy_encode_refusals", "Calls refused by a full encoder.")
        self.embeddings_lost = counter(
            "chiasm_proxy_embeddings_lost",
            "Embeddings lost before the instance that needs them had read them; their images are encoded again.",
        )
        self.places = counter(
            "chiasm_proxy_places",
            "Embeddings of whose place a language instance was told, by outcome: told, untold.",
            ["outcome"],
        )
        self.store_questions = counter(
            "chiasm_proxy_store_questions",
            "Questions to the shared cache, by outcome: answered, late (the request went on without), failed, paused (not "
            "asked after a failure).",
            ["outcome"],
        )
        self.store_used = gauge(
            "chiasm_proxy_store_used",
            "1 if the shared cache is asked, 0 if there is none or a language instance can't use one.",
        )
        self.language_retries = counter(
            "chiasm_proxy_language_retries",
            "Requests sent to an instance again after a lost connection, or after the last encoder was lost.",
        )
        self.waiting = gauge(
            "chiasm_proxy_requests_waiting",
            "Requests that wait, by reason: instance (for one that is expected back), room (all instances are full).",
            ["reason"],
        )
        self.language_refusals = counter(
            "chiasm_proxy_language_refusals", "Calls refused by a full PD, aggregated or prefill instance."
        )
        self.calls_given_up = counter(
            "chiasm_proxy_calls_given_up", "Calls ended because their instance didn't respond."
        )
        self.instances_returned = counter(
            "chiasm_proxy_instances_returned",
            "Instances that responded again after they had been given up, without a restart: frozen, cut off or slow.",
            ["role"],
        )
        self.prefill_retries = counter("chiasm_proxy_prefill_retries", "Prompts prefilled again, for any reason.")
        self.resumed_streams = counter(
            "chiasm_proxy_resumed_streams",
            "Streams resumed on another instance after the client had received tokens, by reason.",
            ["reason"],
        )
        self.handovers = counter("chiasm_proxy_handovers", "Requests handed over to a decode instance.")
        self.leases_given_back = counter(
            "chiasm_proxy_leases_given_back",
            "Requests that ended between prefill and decode, and whose prefill instance was told to free their KV.",
        )
        self.decode_refusals = counter("chiasm_proxy_decode_refusals", "Calls refused by a full decode instance.")
        self.gap = histogram(
            "chiasm_proxy_handover_gap_seconds",
            "Time in a stream between the first token, from prefill, and the second, from decode.",
            buckets=_GAP_BUCKETS,
        )
        self.overhead = histogram(
            "chiasm_proxy_overhead_seconds",
            "The proxy's own time from the last byte of the body to the call of an instance, without fetching images.",
            ["kind"],
            buckets=_OVERHEAD_BUCKETS,
        )
        self.fetch = histogram(
            "chiasm_proxy_fetch_seconds", "Time to fetch a request's images.", buckets=_FETCH_BUCKETS
        )
        self.encode = histogram(
            "chiasm_proxy_encode_seconds", "Time until all encoders of a request had answered.", buckets=_FETCH_BUCKETS
        )
        self.estimate_ratio = histogram(
            "chiasm_proxy_estimate_ratio",
            "Measured time over the estimate at placement, of first tokens and of embeddings.",
            ["what"],
            buckets=_RATIO_BUCKETS,
        )
        # Of what every request counts, by its labels: to look them up takes longer than to count.
        self.requests_of = cache(self.requests.labels)
        self.overhead_of = cache(self.overhead.labels)
        self.estimate_ratio_of = cache(self.estimate_ratio.labels)
        self.traces = counter(
            "chiasm_proxy_traces",
            "Sampled requests by what became of their spans: exported, failed (the collector didn't take them), dropped (too "
            "many waited).",
            ["outcome"],
        )
        self.refusals = Refusals(self.registry)
        self.registry.register(_FleetCollector(fleet))
        ProcessCollector(registry=self.registry)

    def note_traces(self, outcome: str, count: int) -> None:
        """Count what became of the spans of some requests; in any thread."""
        self.traces.labels(outcome).inc(count)

    def render(self) -> bytes:
        """Return the page in Prometheus' text format."""
        return generate_latest(self.registry)


class DemandCollector(Collector):
    """What the images that come ask of encoders, for whoever adds and removes them."""

    def __init__(self, images: EncodeQueue, demand: EncoderDemand) -> None:
        self._images = images
        self._demand = demand

    def collect(self) -> Iterable[GaugeMetricFamily]:
        now = time.monotonic()
        backlog = self._images.backlog(now)
        desired = GaugeMetricFamily(
            DESIRED_METRIC,
            "Encoders that the images of this proxy need; add them up over proxies, and round up.",
            labels=["role"],
        )
        desired.add_metric([Role.ENCODER.value], self._demand.desired(backlog, now))
        load = GaugeMetricFamily(
            "chiasm_fleet_encode_load",
            "Seconds of encoding that came to this proxy in each second of the last 10 or 60.",
            labels=["window_seconds"],
        )
        for window in WINDOWS_SECONDS:
            load.add_metric([f"{window:g}"], self._demand.load(window, now))
        wait = GaugeMetricFamily(
            "chiasm_fleet_encode_wait_seconds",
            "Work that the encoders have yet to do for this proxy, for each of them.",
            value=backlog.seconds / max(1, backlog.encoders),
        )
        return (desired, load, wait)


class _FleetCollector(Collector):
    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterable[GaugeMetricFamily]:
        return self._families()

    def _families(self) -> Iterator[GaugeMetricFamily]:
        yield GaugeMetricFamily(
            "chiasm_proxy_ready",
            "1 if requests for text can be answered, 0 while a role has no instance for that, known or not.",
            value=float(self._fleet.missing is None),
        )
        family = partial(GaugeMetricFamily, labels=["url", "role"])
        healthy = family("chiasm_proxy_instance_healthy", "1 if the instance can be used, otherwise 0.")
        work = family(
            "chiasm_proxy_instance_outstanding_work",
            "Calls at a decode instance, otherwise estimated seconds of the calls under way.",
        )
        calls = family("chiasm_proxy_instance_calls_in_flight", "Calls of the instance under way.")
        encode = family("chiasm_proxy_instance_encode_factor", "Measured over reported seconds to encode.")
        prefill = family("chiasm_proxy_instance_prefill_seconds_per_token", "As learned from answers.")
        now = time.monotonic()
        for instance in self._fleet.instances:
            values = [instance.url, instance.role.value]
            healthy.add_metric(values, float(instance.state is InstanceState.HEALTHY))
            work.add_metric(values, instance.outstanding)
            calls.add_metric(values, instance.in_flight)
            if instance.encodes:
                encode.add_metric(values, instance.costs.encode.factor(now))
            if instance.role in LANGUAGE_ROLES and instance.role is not Role.DECODE:
                prefill.add_metric(values, instance.costs.prefill_seconds_per_token(now))
        yield from (healthy, work, calls, encode, prefill)
