"""The deployments that are compared, over the built-in engine or vLLM; each runs only while it is measured."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

from chiasm.bench.measurement import SERVED_NAME, Bench
from chiasm.cores import usable_cores
from chiasm.errors import ChiasmError, ConfigurationError
from chiasm.extras import Extra, install_command
from chiasm.launch import Deployment, DeploymentConfig, DeploymentNotReadyError, Layout, ProcessState, RoleConfig
from chiasm.launch.config import EngineKind
from chiasm.wire import Role

SHARED_MEMORY = "SharedMemoryConnector"
NIXL = "NixlConnector"
NO_NIXL = f"{NIXL} is left out, because NIXL is not installed ({install_command(Extra.NIXL)} in a clone of chiasm)."
_READY_SECONDS = 180.0
VLLM_READY_SECONDS = 600.0
"""An instance of vLLM needs half a minute of a core before it answers, and several start at the same time."""
_DTYPE = "float32"
"""For all instances whose answers or times are compared with each other, unless their dtype is what is compared."""
IMAGES = ("--limit-mm-per-prompt", '{"image": 8, "video": 0}')
"""For instances of vLLM that take images themselves."""
VLLM_LIMITS = ("--max-model-len", "2048", "--max-num-seqs", "8")
"""Of the length of a sequence and of their number, for all instances of vLLM that one measurement compares."""
_VLLM_KV = ("--kv-cache-memory-bytes", str(640 << 20))
"""Room for as many prompts as the limits allow, with the largest checkpoint that is measured."""
_VLLM_FLAGS = {Role.ENCODER: IMAGES, Role.AGGREGATED: (*_VLLM_KV, *IMAGES)}
_POLL_SECONDS = 0.05
_LINES_SHOWN = 5


def cores() -> tuple[int, int]:
    """Return the two CPUs that measurements pin instances to. Raises ConfigurationError if there is only one."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(allowed) < 2:
        raise ConfigurationError("This measurement pins instances to two cores, but this machine doesn't offer two.")
    return allowed[0], allowed[1]


# Instances have one thread for each CPU that they are pinned to; without pinning, one for half of the cores. Only those that
# are colocated share all cores.


def aggregated(model: str, *, threads: int | None = None) -> DeploymentConfig:
    """Return one instance that does everything, behind a proxy."""
    role = _role(())
    return _deployment(model, {Role.AGGREGATED: role if threads is None else replace(role, threads=threads)})


def encoder_and_pds(
    model: str, *, pds: int = 1, encoder_cpus: tuple[int, ...] = (), pd_cpus: tuple[int, ...] = ()
) -> DeploymentConfig:
    """Return one encoder and ``pds`` PDs behind a proxy."""
    return _deployment(model, {Role.ENCODER: _role(encoder_cpus), Role.PD: _role(pd_cpus, pds)})


def colocated(model: str, counts: Mapping[Role, int] | None = None) -> DeploymentConfig:
    """Return encoders and PDs that share all cores behind a proxy: so many of each, or what `chiasm serve` starts here."""
    roles = {role: RoleConfig(count) for role, count in (counts or {}).items()}
    return replace(_deployment(model, roles), layout=Layout.COLOCATED)


def pinned(model: str) -> DeploymentConfig:
    """Return one encoder and one PD with a core each."""
    first, second = cores()
    return encoder_and_pds(model, encoder_cpus=(first,), pd_cpus=(second,))


def pd_alone(model: str, *, cpus: tuple[int, ...]) -> DeploymentConfig:
    """Return one PD behind a proxy, for text only."""
    return _deployment(model, {Role.PD: _role(cpus)})


def prefill_and_decode(
    model: str,
    *,
    encoders: int = 1,
    kv_connector: str = SHARED_MEMORY,
    prefill_cpus: tuple[int, ...] = (),
    decode_cpus: tuple[int, ...] = (),
) -> DeploymentConfig:
    """Return ``encoders``, one P and one D behind a proxy."""
    prefill, decode = _role(prefill_cpus), _role(decode_cpus)
    roles = {Role.ENCODER: _role((), encoders), Role.PREFILL: prefill, Role.DECODE: decode}
    return replace(_deployment(model, roles), kv_connector=kv_connector)


def _role(cpus: tuple[int, ...], count: int = 1) -> RoleConfig:
    return RoleConfig(count, len(cpus) or max(1, usable_cores() // 2), cpus)


def _deployment(model: str, roles: dict[Role, RoleConfig]) -> DeploymentConfig:
    return DeploymentConfig(model, roles, settings={"dtype": _DTYPE}, served_model_name=SERVED_NAME)


def on_vllm(
    config: DeploymentConfig, limits: tuple[str, ...] = VLLM_LIMITS, *, dtype: str = _DTYPE
) -> DeploymentConfig:
    """Return the same instances over vLLM, with chiasm's EC connector and proxy, and vLLM's own KV connector."""
    roles = {
        role: replace(one, vllm_flags=(*one.vllm_flags, *_VLLM_FLAGS.get(role, _VLLM_KV)))
        for role, one in config.roles.items()
    }
    return replace(
        config,
        engine=EngineKind.VLLM,
        roles=roles,
        kv_connector=None,
        settings={**config.settings, "dtype": dtype},
        vllm_flags=(*config.vllm_flags, *limits),
    )


def kv_connectors() -> tuple[str, ...]:
    """Return the KV connectors that can be used here."""
    from chiasm.transfer.nixl import MODULES

    return (SHARED_MEMORY, NIXL) if any(importlib.util.find_spec(name) for name in MODULES) else (SHARED_MEMORY,)


@asynccontextmanager
async def running(bench: Bench, *configs: DeploymentConfig) -> AsyncIterator[tuple[Deployment, ...]]:
    """Start deployments at the same time, and end them in any case. Raises ConfigurationError, DeploymentNotReadyError."""
    bench.phase("starting")
    async with AsyncExitStack() as stack:
        deployments = []
        for config in configs:
            deployment = Deployment(config, fleet_key=bench.client.fleet_key, forks=bench.forks)
            stack.push_async_callback(stop, deployment)
            await asyncio.to_thread(deployment.start)
            deployments.append(deployment)
        for deployment in deployments:
            await _ready(deployment)
        yield tuple(deployments)


async def _ready(deployment: Deployment) -> None:
    # Deployment.wait_ready would keep its thread busy after a cancellation.
    seconds = VLLM_READY_SECONDS if deployment.config.engine is EngineKind.VLLM else _READY_SECONDS
    until = time.monotonic() + seconds
    while not await asyncio.to_thread(deployment.is_ready):
        _check(deployment)
        if time.monotonic() > until:
            logs = (line for one in deployment.processes for line in deployment.lines(one.name)[-_LINES_SHOWN:])
            raise DeploymentNotReadyError(f"Not ready after {seconds:g} s; last lines: {' | '.join(logs)}")
        await asyncio.sleep(_POLL_SECONDS)


def _check(deployment: Deployment) -> None:
    """Do ``Deployment.check``, and name the process and its model, since a measurement may start several of each."""
    try:
        deployment.check()
    except ConfigurationError as error:
        failed = ", ".join(one.name for one in deployment.processes if one.state is ProcessState.FAILED)
        raise ConfigurationError(f"{failed} of {deployment.config.model}: {error.message}") from error


async def stop(deployment: Deployment) -> None:
    """End a deployment; ``running`` may do it again."""
    await asyncio.shield(asyncio.to_thread(deployment.stop))


def proxy_memory_bytes(deployment: Deployment) -> int:
    """Return the proxy's resident memory. Raises ChiasmError if it isn't running."""
    for process in deployment.processes:
        if process.role is None and (resident := process.memory_bytes) is not None:
            return resident
    raise ChiasmError("The proxy is not running.")


def cpu_seconds(deployment: Deployment) -> dict[str, float]:
    """Return the CPU time so far of each process and its children, by name. Raises ChiasmError if one isn't running."""
    import psutil

    found: dict[str, float] = {}
    for status in deployment.processes:
        try:
            process = psutil.Process(status.pid or -1)
            times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
        except (psutil.NoSuchProcess, ValueError):
            raise ChiasmError(f"{status.name} is not running.") from None
        found[status.name] = sum(float(time.user + time.system) for time in times)
    return found
