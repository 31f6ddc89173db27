"""Runs instances and their proxy as processes on this machine. ``chiasm serve``, the demo, tests and the bench use it.

A start's way: ``config`` (what is asked for) → ``cores``, ``ports``, ``storage`` (what the machine gives) → ``commands``
(what a person would type) → ``child`` (one process, again and again) → ``deployment`` (all of them) → ``health``.
``lifeline`` is the children's side: it ends a process whose parent is gone.
"""

from chiasm.engine.config import Role
from chiasm.launch.child import ProcessState
from chiasm.launch.config import DeploymentConfig, RoleConfig
from chiasm.launch.deployment import Deployment, DeploymentNotReadyError, ProcessStatus

__all__ = [
    "Deployment",
    "DeploymentConfig",
    "DeploymentNotReadyError",
    "ProcessState",
    "ProcessStatus",
    "Role",
    "RoleConfig",
]
