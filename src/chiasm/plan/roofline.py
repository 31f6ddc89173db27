"""Costs of a GPU that isn't here, computed from its datasheet: the longer of computing and of reading memory.

The roofline (Williams et al. 2009) with fixed efficiencies. Prefill reaches about half of a GPU's peak in good engines (Pope
et al. 2022, *Efficiently Scaling Transformer Inference*, report 40 to 76 %), vision towers less, because their matrices are
small, and decode reads memory at about three quarters of the peak. These figures are assumptions: measure on the device before
you trust a difference of less than a third.
"""

from __future__ import annotations

from functools import lru_cache

from chiasm.plan.costs import CostModel, StepShape
from chiasm.plan.devices import Gpu
from chiasm.plan.shapes import ModelShape

PREFILL_EFFICIENCY = 0.5
ENCODE_EFFICIENCY = 0.35
MEMORY_EFFICIENCY = 0.75
LINK_EFFICIENCY = 0.6
"""Share of PCIe's or NVLink's rate that copies reach."""
STEP_SECONDS = 0.003
"""What the engine itself takes for each step: planning, launching kernels, sampling."""
ENCODE_SECONDS = 0.004
"""What launching a tower's kernels and publishing takes for each image."""
PREPARE_SECONDS_PER_PIXEL = 15e-9
"""Decoding a JPEG, resizing and normalizing on one core: about 15 ms for a million pixels."""
REQUEST_SECONDS = 0.005
"""Proxy, HTTP servers and tokenizer."""
EMBEDDING_SECONDS = 0.001
"""Until the waiting engine sees a published embedding."""
KV_SECONDS = 0.003
"""Until a decode instance has asked for the KV."""


class Roofline(CostModel):
    """Costs of a model on one GPU."""

    def __init__(self, gpu: Gpu, shape: ModelShape) -> None:
        self._gpu = gpu
        self._shape = shape
        self._encode = lru_cache(maxsize=4096)(self._encode_seconds)

    def step_seconds(self, step: StepShape, threads: int) -> float:
        language, gpu = self._shape.language, self._gpu
        pair_flops = 4.0 * language.layers * language.heads * language.head_dim
        flops = 2.0 * step.rows * language.layer_parameters + pair_flops * (step.prefill_pairs + step.decode_keys)
        weights = self._shape.bytes_per_value * (language.layer_parameters + language.head_parameters)
        read = weights + step.decode_keys * self._shape.kv_bytes_per_token
        return STEP_SECONDS + max(
            flops / (gpu.flops * PREFILL_EFFICIENCY), read / (gpu.memory_bytes_per_second * MEMORY_EFFICIENCY)
        )

    def encode_seconds(self, height: int, width: int, threads: int) -> float:
        return self._encode(self._shape.tokens_of(height, width))

    def _encode_seconds(self, tokens: int) -> float:
        gpu, vision = self._gpu, self._shape.vision
        read = self._shape.vision_bytes / (gpu.memory_bytes_per_second * MEMORY_EFFICIENCY)
        return ENCODE_SECONDS + max(vision.flops(tokens) / (gpu.flops * ENCODE_EFFICIENCY), read)

    def prepare_seconds(self, height: int, width: int) -> float:
        return height * width * PREPARE_SECONDS_PER_PIXEL

    def embedding_seconds(self, tokens: int) -> float:
        # To the host's memory and from there to the other GPU.
        rate = self._gpu.host_bytes_per_second * LINK_EFFICIENCY / 2
        return EMBEDDING_SECONDS + tokens * self._shape.entry_bytes_per_row / rate

    def kv_seconds(self, tokens: int) -> float:
        rate = self._gpu.peer_bytes_per_second * LINK_EFFICIENCY
        return KV_SECONDS + tokens * self._shape.kv_bytes_per_token / rate

    @property
    def request_seconds(self) -> float:
        return REQUEST_SECONDS
