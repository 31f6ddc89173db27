"""Runs instances and their proxy as processes on this machine; ``chiasm serve``, the demo, the tests and the bench use it.

A start passes the files in this order: ``config`` (what is asked for), ``reserved`` (what must not be) and ``layout`` (who
shares a device), ``arrangement``, ``gpus`` and ``devices`` (which instance computes where on this machine), ``ports`` and
``folders``, ``plan`` (the processes), which uses ``process`` (what one is made from) and ``vllm`` (the command of ``vllm
serve``), ``child`` (one process, started again when it dies) with ``fork_server`` (which starts instances sooner), ``scaling``
(encoders that come and go), ``deployment`` (all of them). In the child, ``run`` runs an instance or the proxy, ``workers`` a
proxy as several processes, and ``supervisor`` is the parent of a server that isn't chiasm's, such as vLLM. ``drain`` takes an
instance down that anybody has started. ``signals`` ends a command.
"""

from typing import TYPE_CHECKING

from chiasm.lazy import names_from

if TYPE_CHECKING:
    from chiasm.launch.child import ProcessState
    from chiasm.launch.config import DeploymentConfig, EngineKind, RoleConfig
    from chiasm.launch.deployment import Deployment, DeploymentNotReadyError, ProcessStatus
    from chiasm.launch.layout import Layout

__all__ = [
    "Deployment",
    "DeploymentConfig",
    "DeploymentNotReadyError",
    "EngineKind",
    "Layout",
    "ProcessState",
    "ProcessStatus",
    "RoleConfig",
]
__getattr__ = names_from(
    __name__,
    {
        "Deployment": "deployment",
        "DeploymentConfig": "config",
        "DeploymentNotReadyError": "deployment",
        "EngineKind": "config",
        "Layout": "layout",
        "ProcessState": "child",
        "ProcessStatus": "deployment",
        "RoleConfig": "config",
    },
)
