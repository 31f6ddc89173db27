"""The parts of the machine that an engine uses: device, dtype, threads, memory."""

from __future__ import annotations

import logging
import socket
from collections.abc import Set
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from chiasm.cores import allowed_cpus, cpu_flags, has_native_bfloat16
from chiasm.engine.attention import KVCache
from chiasm.engine.config import DTYPES
from chiasm.errors import ConfigurationError
from chiasm.memory import free_memory
from chiasm.models.checkpoint import Part, read_json, stored_bytes, stored_dtype

if TYPE_CHECKING:
    from chiasm.engine.config import EngineConfig
    from chiasm.models.base import LanguageModel

logger = logging.getLogger(__name__)

CPU_KV_CACHE_BYTES = 1 << 30
MAX_PREFILL_TOKENS = {"cpu": 256, "cuda": 1 << 30}
"""Prefill rows in any step: enough to use the device well, few enough that a new request soon gets its turn."""
MAX_REST_TOKENS = 64
"""Rows of a prompt's end that aren't worth a step of their own after as many rows as a step may have."""
MIN_TEXT_BEFORE_ITEM = 32
"""Tokens of text that are worth a step of their own while the image after them is encoded: fewer cost as much time, and are
computed with the image for nothing."""
KV_CACHE_SHARE = {"cpu": 0.25, "cuda": 0.8}
"""Share of the memory that is free once the weights are loaded, which the KV cache may take."""
_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPES}


def choose_device(name: str) -> torch.device:
    """Return the device called ``name``; ``auto`` prefers CUDA. Raises ConfigurationError if the device is missing."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigurationError(f"Unknown device {name!r}; use auto, cpu, cuda or cuda:N.") from error
    if device.type not in KV_CACHE_SHARE:
        raise ConfigurationError(f"Device {name!r} is not supported; use auto, cpu, cuda or cuda:N.")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigurationError(
                f"Device {name!r} does not exist: this PyTorch sees no CUDA device. Use --device cpu."
            )
        if (device.index or 0) >= torch.cuda.device_count():
            raise ConfigurationError(
                f"Device {name!r} does not exist; there are {torch.cuda.device_count()} CUDA devices."
            )
        device = torch.device("cuda", device.index or 0)
    return device


def device_id(device: torch.device) -> str:
    """Return a name of the device that no device of another machine has; of a CPU, with the cores that may be used."""
    if device.type == "cuda":
        return f"{socket.gethostname()}/GPU-{torch.cuda.get_device_properties(device).uuid}"
    return f"{socket.gethostname()}/cpu:{','.join(map(str, sorted(allowed_cpus())))}"


def choose_dtype(name: str, model: Path, device: torch.device, flags: Set[str] | None = None) -> torch.dtype:
    """Return the dtype called ``name``; ``auto`` is the checkpoint's own on CUDA, on a CPU what is fastest there.

    That is bfloat16 if the CPU has AVX512-BF16 or AMX, and float32 otherwise: also on ARM, where bfloat16 has not been measured
    and products with packed weights are slow in it. ``flags`` are the CPU's; None: this one's.
    """
    if name == "auto":
        if device.type == "cpu":
            return torch.bfloat16 if has_native_bfloat16(cpu_flags() if flags is None else flags) else torch.float32
        name = stored_dtype(read_json(model / "config.json")) or "bfloat16"
    if name not in _DTYPES:
        raise ConfigurationError(f"Unknown dtype {name!r}; use auto, {', '.join(_DTYPES)}.")
    return _DTYPES[name]


def use_threads(count: int | None) -> None:
    """Set the number of intra-op threads, for the calling thread and those made later; None keeps PyTorch's default."""
    if count is not None:
        torch.set_num_threads(count)


def check_memory(model: Path, device: torch.device, part: Part | None = None) -> None:
    """Raise ConfigurationError if the weights, or those of a part, are clearly larger than the free memory."""
    needed = stored_bytes(model, part)
    if needed > (free := _free_bytes(device)):
        weights = "weights" if part is None else f"{part} weights"
        raise ConfigurationError(
            f"{model} has {needed / 2**30:.1f} GiB of {weights}, but only {free / 2**30:.1f} GiB of memory is free on {device}."
        )


def _free_bytes(device: torch.device) -> int:
    """Return how much of the device's memory is free."""
    return free_memory() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]


def kv_cache_blocks(config: EngineConfig, language: LanguageModel, max_model_len: int) -> tuple[int, int]:
    """Return the number of KV blocks, and the context that they allow.

    If memory is short, a context that the config doesn't ask for shrinks, with a warning. Raises ConfigurationError for one
    that it asks for.
    """
    block_bytes = KVCache.bytes_per_block(language, config.block_size)
    total_bytes = config.kv_cache_bytes
    if total_bytes is None:
        kind = language.device.type
        total_bytes = int(_free_bytes(language.device) * KV_CACHE_SHARE[kind])
        if kind == "cpu":
            total_bytes = min(total_bytes, CPU_KV_CACHE_BYTES)
        useful = config.max_num_seqs * -(-max_model_len // config.block_size) * block_bytes
        total_bytes = min(total_bytes, useful)
    num_blocks = total_bytes // block_bytes
    context = num_blocks * config.block_size
    if context < max_model_len:
        if config.max_model_len is not None or context < config.block_size:
            raise ConfigurationError(
                f"A context of {max_model_len} tokens needs {-(-max_model_len // config.block_size) * block_bytes} bytes of "
                f"KV cache, but there are {total_bytes}; lower --max-model-len or raise --kv-cache-bytes."
            )
        logger.warning(
            "The KV cache holds %d tokens, so the context is limited to them instead of %d.", context, max_model_len
        )
        max_model_len = context
    return num_blocks, max_model_len
