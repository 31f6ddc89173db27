"""The deployments of a comparison while they run: sends trials to them, and starts one again that is stuck."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

from chiasm.bench.arms import Arm
from chiasm.bench.goodput import Limits, Trial
from chiasm.bench.measurement import Bench
from chiasm.bench.topology import cpu_seconds, running, stop
from chiasm.bench.trial import Prepared, play
from chiasm.errors import ChiasmError
from chiasm.launch import Deployment


class RunningArms:
    """Deployments by name; made by ``running_arms``."""

    def __init__(self, bench: Bench, stack: AsyncExitStack, deployments: Mapping[str, Deployment]) -> None:
        self._bench = bench
        self._stack = stack
        self._deployments = dict(deployments)

    @property
    def urls(self) -> dict[str, str]:
        return {name: one.url for name, one in self._deployments.items()}

    @property
    def folder(self) -> Path:
        """That of the checkpoint, which all of them have."""
        return next(iter(self._deployments.values())).folder

    async def play(
        self, name: str, requests: Sequence[Prepared], *, rate: float, seed: int, limits: Mapping[str, Limits]
    ) -> Trial:
        """Send the requests of a trial to one of them. Raises RequestFailedError if it doesn't become idle afterwards."""
        deployment = self._deployments[name]
        before = _process_seconds(deployment)
        trial = await play(self._bench, deployment.url, requests, rate=rate, seed=seed, limits=limits)
        return replace(trial, process_seconds=_used(before, _process_seconds(deployment)))

    async def start_again(self, name: str) -> None:
        """End one of them, whatever it still does, and start it again. Raises ChiasmError if it doesn't become ready."""
        old = self._deployments[name]
        await stop(old)
        (self._deployments[name],) = await self._stack.enter_async_context(running(self._bench, old.config))


@asynccontextmanager
async def running_arms(bench: Bench, arms: Sequence[Arm]) -> AsyncIterator[RunningArms]:
    """Start deployments at the same time, and end them in any case. Raises ConfigurationError, DeploymentNotReadyError."""
    async with AsyncExitStack() as stack:
        deployments = await stack.enter_async_context(running(bench, *(arm.config for arm in arms)))
        yield RunningArms(bench, stack, {arm.name: one for arm, one in zip(arms, deployments, strict=True)})


def _process_seconds(deployment: Deployment) -> dict[str, float]:
    """Return the CPU time so far of each process; nothing while one is being started again."""
    try:
        return cpu_seconds(deployment)
    except ChiasmError:
        return {}


def _used(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Return the CPU time of a trial; nothing if it isn't known because a process was started again."""
    used = {name: after.get(name, 0.0) - seconds for name, seconds in before.items()}
    return used if min(used.values(), default=0.0) >= 0 else {}
