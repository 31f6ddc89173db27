"""The deployments that are compared, each running for as long as it is measured."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from chiasm.bench.measurement import SERVED_NAME, Bench
from chiasm.cores import usable_cores
from chiasm.errors import ChiasmError, ConfigurationError
from chiasm.launch import Deployment, DeploymentConfig, DeploymentNotReadyError, ProcessState, RoleConfig
from chiasm.launch.config import EngineKind
from chiasm.wire import Role

SHARED_MEMORY = "SharedMemoryConnector"
NIXL = "NixlConnector"
NO_NIXL = f"{NIXL} is left out: nixl is not installed (pip install 'chiasm[nixl]')."
_READY_SECONDS = 180.0
VLLM_READY_SECONDS = 600.0
"""One instance of vLLM takes half a minute of a core before it answers, and several start at the same time."""
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


def pd_alone(model: str, *, cpus: tuple[int, ...]) -> DeploymentConfig:
    """One PD behind a proxy, for text alone."""
    return DeploymentConfig(model, {Role.PD: RoleConfig(1, len(cpus), cpus)}, served_model_name=SERVED_NAME)


def prefill_and_decode(
    model: str,
    *,
    encoders: int = 1,
    kv_connector: str = SHARED_MEMORY,
    prefill_cpus: tuple[int, ...] = (),
    decode_cpus: tuple[int, ...] = (),
) -> DeploymentConfig:
    """``encoders``, one P and one D behind a proxy; a thread a CPU that they are pinned to, else as many as a PD has."""
    roles = {
        Role.ENCODER: RoleConfig(encoders, _shared_threads()),
        Role.PREFILL: RoleConfig(1, len(prefill_cpus) or _shared_threads(), prefill_cpus),
        Role.DECODE: RoleConfig(1, len(decode_cpus) or _shared_threads(), decode_cpus),
    }
    return DeploymentConfig(model, roles, served_model_name=SERVED_NAME, kv_connector=kv_connector)


def kv_connectors() -> tuple[str, ...]:
    """Those that can be used here."""
    from chiasm.kv_transfer.nixl import MODULES

    return (SHARED_MEMORY, NIXL) if any(importlib.util.find_spec(name) for name in MODULES) else (SHARED_MEMORY,)


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
    seconds = VLLM_READY_SECONDS if deployment.config.engine is EngineKind.VLLM else _READY_SECONDS
    until = time.monotonic() + seconds
    while not await asyncio.to_thread(deployment.is_ready):
        _check(deployment)
        if time.monotonic() > until:
            logs = (line for one in deployment.processes for line in deployment.lines(one.name)[-_LINES_SHOWN:])
            raise DeploymentNotReadyError(f"not ready after {seconds:g} s; last lines: {' | '.join(logs)}")
        await asyncio.sleep(_POLL_SECONDS)


def _check(deployment: Deployment) -> None:
    """As ``Deployment.check``, and names the process and its model, since a measurement may start several of each."""
    try:
        deployment.check()
    except ConfigurationError as error:
        failed = ", ".join(one.name for one in deployment.processes if one.state is ProcessState.FAILED)
        raise ConfigurationError(f"{failed} of {deployment.config.model}: {error.message}") from error


async def _stop(deployment: Deployment) -> None:
    await asyncio.shield(asyncio.to_thread(deployment.stop))


def proxy_memory_bytes(deployment: Deployment) -> int:
    """What is resident of the proxy now. Raises ChiasmError if it doesn't run."""
    for process in deployment.processes:
        if process.role is None and (resident := process.memory_bytes) is not None:
            return resident
    raise ChiasmError("the proxy does not run")


def cpu_seconds(deployment: Deployment) -> dict[str, float]:
    """Time on a core that each process, and what it has started, has had until now, by its name."""
    import psutil

    found: dict[str, float] = {}
    for status in deployment.processes:
        try:
            process = psutil.Process(status.pid or -1)
            times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
        except (psutil.NoSuchProcess, ValueError):
            raise ChiasmError(f"{status.name} does not run") from None
        found[status.name] = sum(float(time.user + time.system) for time in times)
    return found
