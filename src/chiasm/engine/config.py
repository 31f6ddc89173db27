"""The configuration of one engine."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from chiasm.ec_transfer import ECTransferConfig
from chiasm.errors import ConfigurationError
from chiasm.kv_transfer import KVTransferConfig
from chiasm.media import MediaConfig
from chiasm.options import Option
from chiasm.wire import Role

DTYPES = ("float32", "bfloat16", "float16")
_DEVICE = re.compile(r"auto|cpu|cuda(?::\d+)?")


@dataclass(frozen=True)
class EngineConfig:
    """One engine. None means that the engine chooses at start, from the model and the machine, and logs its choice.

    Raises ConfigurationError for a dtype or a device that doesn't exist anywhere.
    """

    model: Path
    """The folder of the checkpoint."""
    role: Role
    dtype: Annotated[
        str,
        Option(
            "float32, bfloat16, float16 or auto: the checkpoint's dtype on CUDA, on a CPU bfloat16 if it has AVX512-BF16 or "
            "AMX, otherwise float32.",
            metavar="DTYPE",
        ),
    ] = "auto"
    zendnn: Annotated[
        bool,
        Option(
            "Compute the decoder's products with ZenDNN (extra zen), which decodes faster on AMD's CPUs with AVX-512."
        ),
    ] = False
    device: Annotated[str, Option("auto, cpu, cuda or cuda:N.", metavar="DEVICE")] = "auto"
    threads: Annotated[int | None, Option("Intra-op CPU threads.", min=1, unset="all cores")] = None
    core_share: Annotated[
        Path | None,
        Option(
            "File through which instances of this machine share cores; each computes on those that the others leave.",
            metavar="FILE",
            unset="cores are not shared",
        ),
    ] = None
    nice: Annotated[
        int, Option("Niceness of the compute threads; above 0 lets other instances go first.", min=0, max=19)
    ] = 0
    block_size: Annotated[int, Option("Tokens in one KV block.", min=1)] = 16
    kv_cache_bytes: Annotated[int | None, Option("Size of the KV cache.", unset="chosen from the free memory")] = None
    encoder_cache_bytes: Annotated[
        int,
        Option(
            "Maximum size of the embeddings held in memory; of a decode instance, which holds none, that of the KV of prompts "
            "with images for which its blocks are short."
        ),
    ] = 512 << 20
    max_num_batched_tokens: Annotated[
        int,
        Option(
            "Maximum tokens in one step, decodes and prefill chunks together; on a CPU at most 256 are prefilled.",
            min=1,
        ),
    ] = 2048
    max_num_seqs: Annotated[int, Option("Maximum sequences computed at the same time.", min=1)] = 64
    max_queued_requests: Annotated[int, Option("Maximum requests waiting to be computed.", min=1)] = 256
    max_model_len: Annotated[
        int | None, Option("Maximum tokens of prompt and answer together.", min=1, unset="the model's")
    ] = None
    max_items: Annotated[int, Option("Maximum images in one request.", min=0)] = 16
    ec: ECTransferConfig | None = None
    """How embeddings travel; None for an aggregated instance, which makes its own, and for decode, which needs none."""
    kv: KVTransferConfig | None = None
    """How a prompt's KV travels from prefill to decode; None for the other roles."""
    media: MediaConfig = field(default_factory=MediaConfig)
    """What decoding an image may cost an encoder."""

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", *DTYPES):
            raise ConfigurationError(f"Unknown dtype {self.dtype!r}; use auto, {', '.join(DTYPES)}.")
        if not _DEVICE.fullmatch(self.device):
            raise ConfigurationError(f"Unknown device {self.device!r}; use auto, cpu, cuda or cuda:N.")
