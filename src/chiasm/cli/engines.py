"""What the options of ``chiasm serve`` become for the engine that instances run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from chiasm.cli.options import ArgumentOptions, EngineOptions, MediaOptions
from chiasm.errors import ConfigurationError
from chiasm.launch.config import EngineKind
from chiasm.wire import Role

_OF_VLLM = {
    "dtype": "--dtype",
    "max_model_len": "--max-model-len",
    "max_num_batched_tokens": "--max-num-batched-tokens",
    "max_num_seqs": "--max-num-seqs",
    "max_queued_requests": "--max-num-queued-reqs",
    "block_size": "--block-size",
}
"""What means the same to every instance of vLLM."""
_NOT_OF_VLLM = {
    "device": "vLLM computes on what it is built for; name GPUs with --encoder-devices, --pd-devices and the like",
    "encoder_cache_bytes": "vLLM counts that cache in tokens, as many as --max-num-batched-tokens",
}
_SEES_IMAGES = (Role.ENCODER, Role.AGGREGATED)


@dataclass(frozen=True)
class Flags:
    """Arguments for instances: first those for all, then those for the ones of a role."""

    of_all: tuple[str, ...]
    _of_roles: Mapping[Role, tuple[str, ...]] = field(default_factory=dict)

    def of_role(self, role: Role) -> tuple[str, ...]:
        return self._of_roles.get(role, ())


def flags_of(
    engine: EngineKind, options: EngineOptions, media: MediaOptions, arguments: ArgumentOptions, log_level: str
) -> Flags:
    """Raises ConfigurationError for options that mean nothing to the engine."""
    given = arguments.given()
    if engine is EngineKind.VLLM:
        return _of_vllm(options.given(), given, log_level)
    if "vllm_args" in given:
        raise ConfigurationError("--vllm-args are for --engine vllm; the built-in engine has options of its own")
    return Flags(
        (*options.arguments(), *media.arguments(), "--log-level", log_level),
        {role: tuple(given.get(f"{role}_args", ())) for role in Role},
    )


def _of_vllm(options: Mapping[str, Any], arguments: Mapping[str, Sequence[str]], log_level: str) -> Flags:
    """Options about media are the proxy's alone: it fetches for all, and vLLM sees no URL but ``data:``."""
    given = dict(options)
    if given.get("device") == "auto":
        del given["device"]
    for name, why in _NOT_OF_VLLM.items():
        if name in given:
            raise ConfigurationError(f"--{name.replace('_', '-')} means nothing to vLLM: {why}")
    of_all: list[str] = ["--log-level", log_level.upper(), "--uvicorn-log-level", log_level.lower()]
    for name, flag in _OF_VLLM.items():
        if name in given:
            of_all += [flag, str(given[name])]
    of_roles: dict[Role, tuple[str, ...]] = {}
    for role in Role:
        flags: list[str] = []
        if role in _SEES_IMAGES and "max_items" in given:
            flags += ["--limit-mm-per-prompt", json.dumps({"image": given["max_items"]})]
        if role is not Role.ENCODER and "kv_cache_bytes" in given:
            flags += ["--kv-cache-memory-bytes", str(given["kv_cache_bytes"])]
        of_roles[role] = (*flags, *arguments.get("vllm_args", ()), *arguments.get(f"{role}_args", ()))
    return Flags(tuple(of_all), of_roles)
