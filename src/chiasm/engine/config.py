"""The configuration of one engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from chiasm.ec_transfer import ECTransferConfig
from chiasm.kv_transfer import KVTransferConfig
from chiasm.wire import Role


@dataclass(frozen=True)
class EngineConfig:
    """One engine. None means that the engine chooses at start, from the model and the machine, and logs its choice."""

    model: Path
    """The folder of the checkpoint."""
    role: Role
    dtype: str = "auto"
    """``auto`` (float32 on CPU, the checkpoint's on CUDA), ``float32``, ``bfloat16`` or ``float16``."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N``."""
    threads: int | None = None
    """Intra-op CPU threads; None keeps PyTorch's default, which is all cores."""
    block_size: int = 16
    """Tokens per KV block."""
    kv_cache_bytes: int | None = None
    encoder_cache_bytes: int = 512 << 20
    """Maximum total size of the embeddings held in memory."""
    max_num_batched_tokens: int = 2048
    """Maximum rows of one step, decodes and prefill chunks together."""
    max_num_seqs: int = 64
    """Maximum number of sequences that compute at the same time."""
    max_queued_requests: int = 256
    max_model_len: int | None = None
    """Maximum tokens of prompt and answer together."""
    max_items: int = 16
    """Maximum number of images per request."""
    ec: ECTransferConfig | None = None
    """How embeddings travel; None for an aggregated instance, which makes its own, and for decode, which needs none."""
    kv: KVTransferConfig | None = None
    """How a prompt's KV travels from prefill to decode; None for the other roles."""
