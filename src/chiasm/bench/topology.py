"""The deployments that are compared, each running for as long as it is measured."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from chiasm.bench.measurement import SERVED_NAME, Bench
from chiasm.engine.config import Role
from chiasm.errors import ChiasmError, ConfigurationError
from chiasm.launch import Deployment, DeploymentConfig, DeploymentNotReadyError, RoleConfig
from chiasm.launch.cores import usable_cores

_READY_SECONDS = 180.0
_POLL_SECONDS = 0.05
_LINES_SHOWN = 5


def cores() -> tuple[int, int]:
    """The two CPUs that measurements pin instances to. Raises ConfigurationError where there is one only."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(allowed) < 2:
        raise ConfigurationError("this measurement pins instances to two cores, and this machine does not offer them")
    return allowed[0], allowed[1]


def _shared_threads() -> int:
    """Threads of each instance where E and PD share the cores, as ``chiasm serve`` shares them out."""
    return max(1, usable_cores() // 2)


def aggregated(model: str, *, cpus: tuple[int, ...] = ()) -> DeploymentConfig:
    """One instance that does it all, behind a proxy; a thread a CPU that it is pinned to, else as many as a PD has."""
    one = RoleConfig(1, len(cpus) or _shared_threads(), cpus)
    return DeploymentConfig(model, {Role.AGGREGATED: one}, served_model_name=SERVED_NAME)


def encoder_and_pds(
    model: str,
    *,
    pds: int = 1,
    encoder_cpus: tuple[int, ...] = (),
    pd_cpus: tuple[int, ...] = (),
) -> DeploymentConfig:
    """One encoder and ``pds`` PDs behind a proxy, with a thread a CPU that they are pinned to."""
    roles = {
        Role.ENCODER: RoleConfig(1, len(encoder_cpus) or _shared_threads(), encoder_cpus),
        Role.PD: RoleConfig(pds, len(pd_cpus) or _shared_threads(), pd_cpus),
    }
    return DeploymentConfig(model, roles, served_model_name=SERVED_NAME)


def pinned(model: str) -> DeploymentConfig:
    """One encoder and one PD with a core each."""
    first, second = cores()
    return encoder_and_pds(model, encoder_cpus=(first,), pd_cpus=(second,))


@asynccontextmanager
async def running(bench: Bench, *configs: DeploymentConfig) -> AsyncIterator[tuple[Deployment, ...]]:
    """Start deployments at the same time, and end them in any case. Raises ConfigurationError, DeploymentNotReadyError."""
    bench.step("starting")
    async with AsyncExitStack() as stack:
        deployments = []
        for config in configs:
            deployment = Deployment(config)
            stack.push_async_callback(_stop, deployment)
            await asyncio.to_thread(deployment.start)
            deployments.append(deployment)
        for deployment in deployments:
            await _ready(deployment)
        yield tuple(deployments)


async def _ready(deployment: Deployment) -> None:
    # Deployment.wait_ready would go on in its thread after a cancellation.
    until = time.monotonic() + _READY_SECONDS
    while not await asyncio.to_thread(deployment.is_ready):
        deployment.check()
        if time.monotonic() > until:
            logs = (line for one in deployment.processes for line in deployment.lines(one.name)[-_LINES_SHOWN:])
            raise DeploymentNotReadyError(f"not ready after {_READY_SECONDS:g} s; last lines: {' | '.join(logs)}")
        await asyncio.sleep(_POLL_SECONDS)


async def _stop(deployment: Deployment) -> None:
    await asyncio.shield(asyncio.to_thread(deployment.stop))


def proxy_memory_bytes(deployment: Deployment) -> int:
    """What is resident of the proxy now. Raises ChiasmError if it doesn't run."""
    for process in deployment.processes:
        if process.role is None and (resident := process.memory_bytes) is not None:
            return resident
    raise ChiasmError("the proxy does not run")
