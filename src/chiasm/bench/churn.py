"""A fleet whose instances join and drain again and again while clients ask. What fails, and how long each step takes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import sys
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chiasm.bench.client import Client, RequestFailedError
from chiasm.bench.measurement import SERVED_NAME
from chiasm.errors import ChiasmError
from chiasm.launch.ports import HeldPort
from chiasm.launch.process import instance_process, proxy_process, to_json
from chiasm.wire import Role

_START_SECONDS = 120.0
_STEP_SECONDS = 60.0
_LOOK_SECONDS = 0.02
_PAUSE_SECONDS = 0.05
"""Between two requests of a client, so that instances find time to start."""
_SMALL: Mapping[str, Any] = {"threads": 1, "kv_cache_bytes": 16 << 20, "max_model_len": 512, "log_level": "warning"}
_CONNECTORS: Mapping[Role, Mapping[str, Any]] = {
    Role.ENCODER: {"connector": "TcpConnector", "ec_max_bytes": 64 << 20},
    Role.PD: {"connector": "TcpConnector"},
    Role.PREFILL: {"connector": "TcpConnector"},
    Role.DECODE: {},
}


class Nursery:
    """Starts instances as forks (:mod:`chiasm.bench.nursery`), and hears what becomes of them."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._born: asyncio.Queue[int] = asyncio.Queue()
        self._ready: dict[int, asyncio.Future[tuple[str, float]]] = {}
        self._ended: dict[int, asyncio.Future[int]] = {}
        self._hearing = asyncio.create_task(self._hear())

    async def bear(self, configuration: str) -> int:
        """Start an instance; return its process id. One at a time."""
        assert self._process.stdin is not None
        self._process.stdin.write(configuration.encode() + b"\n")
        return await asyncio.wait_for(self._born.get(), _START_SECONDS)

    async def ready(self, pid: int) -> tuple[str, float]:
        """Return an instance's URL, and when it was ready."""
        return await asyncio.wait_for(asyncio.shield(self._ready[pid]), _START_SECONDS)

    async def ended(self, pid: int) -> int:
        """Return the exit code of an instance when it has ended."""
        return await asyncio.wait_for(asyncio.shield(self._ended[pid]), _STEP_SECONDS)

    async def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), _STEP_SECONDS)
        self._hearing.cancel()
        await asyncio.gather(self._hearing, return_exceptions=True)

    async def _hear(self) -> None:
        assert self._process.stdout is not None
        loop = asyncio.get_running_loop()
        while line := (await self._process.stdout.readline()).decode():
            what, number, *more = line.split()
            pid = int(number)
            if what == "born":
                self._ready[pid], self._ended[pid] = loop.create_future(), loop.create_future()
                self._born.put_nowait(pid)
            elif what == "ready":
                self._ready[pid].set_result((more[0], time.perf_counter()))
            else:
                if not self._ready[pid].done():
                    self._ready[pid].set_exception(
                        ChiasmError(f"An instance ended with exit code {more[0]}; see its log.")
                    )
                self._ended[pid].set_result(int(more[0]))


@dataclass
class Churned:
    """What came of it."""

    answers: int = 0
    wrong: int = 0
    """Answers that differ from those of the fleet before anything was changed."""
    failures: list[str] = field(default_factory=list)
    """The messages of requests that failed."""
    exit_codes: list[int] = field(default_factory=list)
    """Of the instances that were drained."""
    join_seconds: list[float] = field(default_factory=list)
    """From "ready" at the instance to "healthy" at every proxy."""
    drain_seconds: list[float] = field(default_factory=list)
    """From the signal to the end of the process."""


class Churn:
    """A fleet of one instance or more of each role, all of which have joined all proxies."""

    def __init__(
        self, model: Path, roles: Sequence[Role], proxies: Sequence[str], nursery: Nursery, client: Client
    ) -> None:
        self._model = model
        self.roles = roles
        self.proxies = proxies
        self._nursery = nursery
        self._client = client
        self._members: dict[Role, deque[int]] = defaultdict(deque)
        """Process ids by role, the oldest first."""
        self._bearing = asyncio.Lock()

    async def join(self, role: Role) -> float:
        """Add an instance; return the seconds from its being ready until every proxy uses it."""
        settings = {
            **_SMALL,
            **_CONNECTORS[role],
            "port": 0,
            "join": tuple(self.proxies),
            "served_model_name": SERVED_NAME,
        }
        async with self._bearing:
            pid = await self._nursery.bear(to_json(instance_process(self._model, role, settings)))
        url, ready = await self._nursery.ready(pid)
        async with asyncio.timeout(_STEP_SECONDS):
            for proxy in self.proxies:
                while True:
                    if await self._is_healthy(proxy, url):
                        break
                    await asyncio.sleep(_LOOK_SECONDS)
        self._members[role].append(pid)
        return time.perf_counter() - ready

    async def drain(self, role: Role) -> tuple[int, float]:
        """End the oldest instance of a role by SIGTERM; return its exit code, and how long that took."""
        pid, began = self._members[role].popleft(), time.perf_counter()
        os.kill(pid, signal.SIGTERM)
        return await self._nursery.ended(pid), time.perf_counter() - began

    async def run(self, changes: int, bodies: Sequence[bytes], clients: int, advance: Callable[[], None]) -> Churned:
        """Join and drain ``changes`` instances, of all roles in turn, while so many clients ask."""
        found = Churned()
        expected = [await self._answer(self.proxies[0], body) for body in bodies]
        is_over = asyncio.Event()
        asking = [asyncio.create_task(self._ask_on(one, bodies, expected, found, is_over)) for one in range(clients)]
        try:
            for role in itertools.islice(itertools.cycle(self.roles), changes):
                found.join_seconds.append(await self.join(role))
                code, seconds = await self.drain(role)
                found.exit_codes.append(code)
                found.drain_seconds.append(seconds)
                advance()
        finally:
            is_over.set()
            await asyncio.gather(*asking)
        return found

    async def _ask_on(
        self, number: int, bodies: Sequence[bytes], expected: Sequence[str], found: Churned, is_over: asyncio.Event
    ) -> None:
        for turn in itertools.count(number):
            if is_over.is_set():
                return
            which = turn % len(bodies)
            try:
                text = await self._answer(self.proxies[turn % len(self.proxies)], bodies[which])
            except RequestFailedError as error:
                found.failures.append(error.message)
            else:
                found.answers += 1
                found.wrong += text != expected[which]
            await asyncio.sleep(_PAUSE_SECONDS)

    async def _answer(self, proxy: str, body: bytes) -> str:
        if json.loads(body).get("stream"):
            return (await self._client.chat(proxy, body)).text
        _, _, answer = await self._client.post(proxy, body)
        return str(answer["choices"][0]["message"]["content"])

    async def _is_healthy(self, proxy: str, url: str) -> bool:
        with contextlib.suppress(RequestFailedError):
            instances = (await self._client.proxy_health(proxy)).instances
            return any(one.url == url and one.state == "healthy" for one in instances)
        return False


@asynccontextmanager
async def churning(
    model: Path, client: Client, *, roles: Sequence[Role], proxies: int = 1, each: int = 1
) -> AsyncIterator[Churn]:
    """A fleet with ``each`` instances of each role, which has ended when the block does."""
    environment = os.environ | client.fleet_key.environment() | {"PYTHONUNBUFFERED": "1"}
    async with AsyncExitStack() as stack:
        urls = [await stack.enter_async_context(_proxy(environment)) for _ in range(proxies)]
        nursery = Nursery(
            await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "chiasm.bench.nursery",
                str(model),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env=environment,
            )
        )
        stack.push_async_callback(nursery.close)
        churn = Churn(model, roles, urls, nursery, client)
        await asyncio.gather(*(churn.join(role) for role in roles for _ in range(each)))
        yield churn


@asynccontextmanager
async def _proxy(environment: Mapping[str, str]) -> AsyncIterator[str]:
    """A proxy without instances, at a free port; gives its URL."""
    address = HeldPort("127.0.0.1")
    settings = {"port": address.port, "log_level": "warning"}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "chiasm", "child", "proxy"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=dict(environment),
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(to_json(proxy_process(settings)).encode() + b"\n")
        await asyncio.wait_for(process.stdout.readline(), _START_SECONDS)
        yield address.url
    finally:
        process.stdin.close()  # it ends with it
        await process.wait()
        address.release()
