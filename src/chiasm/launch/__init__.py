"""Runs instances and their proxy as processes on this machine. ``chiasm serve``, the demo, tests and the bench use it.

A start's way: ``config`` (what is asked for) → ``devices``, ``ports``, ``storage`` (what the machine gives) →
``plan`` (the processes), by ``commands`` or ``vllm`` (what a person would type) → ``child`` (one process, again and again) →
``deployment`` (all of them) → ``health``. The children's side: ``lifeline`` ends a process whose parent is gone, and
``supervisor`` is the parent of a server that knows nothing of all this, as vLLM; ``diagnosis`` says why one has ended.
"""

from chiasm.launch.child import ProcessState
from chiasm.launch.config import DeploymentConfig, EngineKind, RoleConfig
from chiasm.launch.deployment import Deployment, DeploymentNotReadyError, ProcessStatus

__all__ = [
    "Deployment",
    "DeploymentConfig",
    "DeploymentNotReadyError",
    "EngineKind",
    "ProcessState",
    "ProcessStatus",
    "RoleConfig",
]
