"""All measurements, in the order in which they run."""

from __future__ import annotations

from chiasm.bench.measurement import Measurement
from chiasm.bench.measurements.decode_isolation import DecodeIsolation
from chiasm.bench.measurements.engines import Engines
from chiasm.bench.measurements.handoff import Handoff
from chiasm.bench.measurements.identity import Identity
from chiasm.bench.measurements.idle import Idle
from chiasm.bench.measurements.isolation import Isolation
from chiasm.bench.measurements.kv import Kv
from chiasm.bench.measurements.overlap import Overlap
from chiasm.bench.measurements.proxy import Proxy
from chiasm.bench.measurements.reuse import Reuse
from chiasm.bench.measurements.split import Split
from chiasm.bench.measurements.ttft import Ttft
from chiasm.bench.measurements.vllm_example import VllmExample
from chiasm.bench.measurements.vllm_identity import VllmIdentity
from chiasm.bench.measurements.vllm_reuse import VllmReuse

_BUILT_IN = (Identity, Ttft, Handoff, Overlap, Isolation, Reuse, Proxy, Kv, Split, DecodeIsolation, Idle)
_OVER_VLLM = (VllmIdentity, VllmExample, Engines, VllmReuse)

MEASUREMENTS: dict[str, type[Measurement]] = {one.name: one for one in (*_BUILT_IN, *_OVER_VLLM)}
"""By name."""
