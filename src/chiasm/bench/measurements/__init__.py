"""All measurements, in the order in which they run."""

from __future__ import annotations

from chiasm.bench.measurement import Measurement
from chiasm.bench.measurements.arrivals import Arrivals
from chiasm.bench.measurements.churn import ChurnMeasurement
from chiasm.bench.measurements.engines import Engines
from chiasm.bench.measurements.goodput import GoodputMeasurement
from chiasm.bench.measurements.handoff import Handoff
from chiasm.bench.measurements.identity import Identity
from chiasm.bench.measurements.idle import Idle
from chiasm.bench.measurements.isolation import DECODE_ISOLATION, ISOLATION
from chiasm.bench.measurements.kv import Kv
from chiasm.bench.measurements.latency import Split
from chiasm.bench.measurements.overlap import Overlap
from chiasm.bench.measurements.proxy import Proxy
from chiasm.bench.measurements.reuse import Reuse
from chiasm.bench.measurements.routing import Routing
from chiasm.bench.measurements.scaling import Scaling
from chiasm.bench.measurements.soak import Soak
from chiasm.bench.measurements.step import DecodeStep
from chiasm.bench.measurements.store import StoreReads
from chiasm.bench.measurements.ttft import Ttft
from chiasm.bench.measurements.vllm_example import VllmExample
from chiasm.bench.measurements.vocabulary import Vocabulary
from chiasm.launch.config import EngineKind


def _by_name(*measurements: Measurement) -> dict[str, Measurement]:
    return {one.name: one for one in measurements}


MEASUREMENTS: dict[EngineKind, dict[str, Measurement]] = {
    EngineKind.CHIASM: _by_name(
        Identity(EngineKind.CHIASM),
        Ttft(),
        Handoff(),
        Arrivals(),
        Overlap(),
        ISOLATION,
        Reuse(EngineKind.CHIASM),
        Proxy(),
        Routing(),
        Scaling(),
        Kv(),
        Split(),
        DECODE_ISOLATION,
        DecodeStep(),
        Idle(),
        Vocabulary(),
        StoreReads(),
        Soak(),
        ChurnMeasurement(),
        GoodputMeasurement(EngineKind.CHIASM),
    ),
    EngineKind.VLLM: _by_name(
        Identity(EngineKind.VLLM),
        VllmExample(),
        Engines(),
        Reuse(EngineKind.VLLM),
        GoodputMeasurement(EngineKind.VLLM),
    ),
}
"""By the engine that runs in the instances, then by name."""
