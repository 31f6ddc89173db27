"""The topologies that are compared, with vLLM's instances in place of chiasm's own."""

from __future__ import annotations

from dataclasses import replace

from chiasm.launch import DeploymentConfig
from chiasm.launch.config import EngineKind
from chiasm.wire import Role

DTYPE = ("--dtype", "float32")
"""Of all instances whose answers or times are compared with each other."""
_LIMITS = ("--max-model-len", "2048", "--max-num-seqs", "8")
_KV = ("--kv-cache-memory-bytes", str(640 << 20))
"""Room for as many prompts as the limits allow, of the largest checkpoint that is measured."""
IMAGES = ("--limit-mm-per-prompt", '{"image": 8, "video": 0}')
"""For instances that take images themselves."""
_OF_ROLE = {Role.ENCODER: IMAGES, Role.AGGREGATED: (*_KV, *IMAGES)}


def on_vllm(config: DeploymentConfig) -> DeploymentConfig:
    """The same instances over vLLM, with chiasm's connector and proxy."""
    roles = {
        role: replace(one, vllm_flags=(*one.vllm_flags, *_OF_ROLE.get(role, _KV))) for role, one in config.roles.items()
    }
    flags = (*config.vllm_flags, *DTYPE, *_LIMITS)
    return replace(config, engine=EngineKind.VLLM, roles=roles, kv_connector=None, vllm_flags=flags)
