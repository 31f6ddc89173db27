"""A fleet whose instances join and drain again and again while clients ask. What fails, and how long each step takes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from chiasm.bench.client import Client, RequestFailedError
from chiasm.bench.measurement import SERVED_NAME
from chiasm.errors import ChiasmError
from chiasm.launch.child import Process, describe_exit
from chiasm.launch.fork_server import ForkServer
from chiasm.launch.ports import HeldPort
from chiasm.launch.process import instance_process, proxy_process, to_json
from chiasm.wire import Role

_START_SECONDS = 120.0
_STEP_SECONDS = 60.0
_LOOK_SECONDS = 0.02
_PAUSE_SECONDS = 0.05
"""Between two requests of a client, so that instances find time to start."""
_SMALL: Mapping[str, Any] = {
    "dtype": "float32",  # in bfloat16, answers of random weights depend on what is computed beside them
    "threads": 1,
    "kv_cache_bytes": 16 << 20,
    "max_model_len": 512,
    "log_level": "warning",
}
_CONNECTORS: Mapping[Role, Mapping[str, Any]] = {
    Role.ENCODER: {"connector": "TcpConnector", "ec_max_bytes": 64 << 20},
    Role.PD: {"connector": "TcpConnector"},
    Role.PREFILL: {"connector": "TcpConnector"},
    Role.DECODE: {},
    Role.AGGREGATED: {},
}


class Instances:
    """Starts instances as forks of one process, so that a start takes about what loading the model does."""

    def __init__(self, model: Path, forks: ForkServer, environment: Mapping[str, str]) -> None:
        self._model = model
        self._forks = forks
        self._environment = environment
        self._running: set[int] = set()

    async def start(self, role: Role, settings: Mapping[str, Any]) -> Process:
        configuration = to_json(instance_process(self._model, role, settings))
        command = [sys.executable, "-m", "chiasm", "child", f"{role}-churn"]
        process = await asyncio.to_thread(self._forks.start, self._model, command, self._environment)
        self._running.add(process.pid)
        process.stdin.write(f"{configuration}\n")
        process.stdin.flush()
        threading.Thread(target=_pass_on, args=(process.stderr,), name="chiasm-churn-log", daemon=True).start()
        return process

    async def ready(self, process: Process) -> tuple[str, float]:
        """Return an instance's URL, and when it was ready. Raises ChiasmError if it ends before."""
        line = await asyncio.wait_for(asyncio.to_thread(process.stdout.readline), _START_SECONDS)
        if not line:
            raise ChiasmError(f"An instance ended with {describe_exit(await self.ended(process))}; see its log.")
        return line.split()[-1], time.perf_counter()

    async def ended(self, process: Process) -> int:
        """Return the exit code of an instance when it has ended."""
        code = await asyncio.wait_for(asyncio.to_thread(process.wait), _STEP_SECONDS)
        self._running.discard(process.pid)
        process.stdin.close()
        process.stdout.close()
        return code

    def close(self) -> None:
        """Kill what still runs."""
        for pid in self._running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def _pass_on(stream: IO[str]) -> None:
    with stream:
        for line in stream:
            sys.stderr.write(line)


class JoinedProxy:
    """A proxy that knows the instances which join it, at one port for as long as this object lives."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = dict(environment)
        self._address = HeldPort("127.0.0.1")
        self._process: asyncio.subprocess.Process | None = None
        self.url = self._address.url

    async def start(self) -> None:
        """Start it; return when it takes requests."""
        process = self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "chiasm", "child", "proxy"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=self._environment,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        settings = {"port": self._address.port, "log_level": "warning"}
        process.stdin.write(to_json(proxy_process(settings)).encode() + b"\n")
        await asyncio.wait_for(process.stdout.readline(), _START_SECONDS)

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    async def ended(self) -> int:
        """Return its exit code when it has ended."""
        assert self._process is not None
        return await asyncio.wait_for(self._process.wait(), _STEP_SECONDS)

    async def close(self) -> None:
        """End it, and release its port."""
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()  # it ends with it
            await self._process.wait()
        self._address.release()


@dataclass
class Churned:
    """What came of it."""

    answers: int = 0
    differences: list[str] = field(default_factory=list)
    """For each answer that differs from that of the fleet before anything was changed: both, and what was asked."""
    failures: list[str] = field(default_factory=list)
    """The messages of requests that failed."""
    exit_codes: list[int] = field(default_factory=list)
    """Of the instances that were drained."""
    join_seconds: list[float] = field(default_factory=list)
    """From "ready" at the instance to "healthy" at every proxy."""
    drain_seconds: list[float] = field(default_factory=list)
    """From the signal to the end of the process."""

    def add(self, other: Churned) -> None:
        """Add what came of another fleet."""
        self.answers += other.answers
        self.differences += other.differences
        self.failures += other.failures
        self.exit_codes += other.exit_codes
        self.join_seconds += other.join_seconds
        self.drain_seconds += other.drain_seconds


class Churn:
    """A fleet of one instance or more of each role, all of which have joined all proxies."""

    def __init__(
        self, roles: Sequence[Role], proxies: Sequence[JoinedProxy], instances: Instances, client: Client
    ) -> None:
        self.roles = roles
        self.proxies = proxies
        self._instances = instances
        self._client = client
        self._members: dict[Role, deque[tuple[str, Process]]] = defaultdict(deque)
        """URLs and processes by role, the oldest first."""

    async def join(self, role: Role) -> float:
        """Add an instance; return the seconds from its being ready until every proxy uses it."""
        settings = {
            **_SMALL,
            **_CONNECTORS[role],
            "port": 0,
            "join": tuple(one.url for one in self.proxies),
            "served_model_name": SERVED_NAME,
        }
        process = await self._instances.start(role, settings)
        url, ready = await self._instances.ready(process)
        async with asyncio.timeout(_STEP_SECONDS):
            for proxy in self.proxies:
                await self._until(proxy, url, is_healthy=True)
        self._members[role].append((url, process))
        return time.perf_counter() - ready

    async def drain(self, role: Role) -> tuple[int, float]:
        """End the oldest instance of a role by SIGTERM; return its exit code, and how long that took."""
        (_, process), began = self._members[role].popleft(), time.perf_counter()
        os.kill(process.pid, signal.SIGTERM)
        return await self._instances.ended(process), time.perf_counter() - began

    async def kill_while_draining(self, role: Role) -> int:
        """Kill the oldest instance of a role as soon as the first proxy sees that it drains; return its exit code.

        That is 0 if it had ended before.
        """
        url, process = self._members[role].popleft()
        os.kill(process.pid, signal.SIGTERM)
        async with asyncio.timeout(_STEP_SECONDS):
            await self._until(self.proxies[0], url, is_healthy=False)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        return await self._instances.ended(process)

    async def run(self, changes: int, bodies: Sequence[bytes], clients: int, advance: Callable[[], None]) -> Churned:
        """Join and drain ``changes`` instances, of all roles in turn, while so many clients ask."""
        expected = {body: await self.answer(self.proxies[0], body) for body in bodies}
        async with self.asking(self.proxies, expected, clients, pause_seconds=_PAUSE_SECONDS) as found:
            for role in itertools.islice(itertools.cycle(self.roles), changes):
                found.join_seconds.append(await self.join(role))
                code, seconds = await self.drain(role)
                found.exit_codes.append(code)
                found.drain_seconds.append(seconds)
                advance()
        return found

    @asynccontextmanager
    async def asking(
        self, proxies: Sequence[JoinedProxy], expected: Mapping[bytes, str], clients: int, *, pause_seconds: float = 0.0
    ) -> AsyncIterator[Churned]:
        """A block during which so many clients ask these proxies in turn; gives what comes of it.

        ``expected`` has the right answer to each request.
        """
        found, is_over = Churned(), asyncio.Event()
        asked = list(expected.items())

        async def ask_on(number: int) -> None:
            for turn in itertools.count(number):
                if is_over.is_set():
                    return
                question = turn % len(asked)
                body, right = asked[question]
                try:
                    text = await self.answer(proxies[turn % len(proxies)], body)
                except RequestFailedError as error:
                    found.failures.append(error.message)
                else:
                    found.answers += 1
                    if text != right:
                        found.differences.append(f"to question {question}: {text!r}, and before: {right!r}")
                await asyncio.sleep(pause_seconds)

        tasks = [asyncio.create_task(ask_on(one)) for one in range(clients)]
        try:
            yield found
        finally:
            is_over.set()
            await asyncio.gather(*tasks)

    async def answer(self, proxy: JoinedProxy, body: bytes) -> str:
        """Ask a proxy, and return its answer's text. Raises RequestFailedError."""
        if json.loads(body).get("stream"):
            return (await self._client.chat(proxy.url, body)).text
        _, _, answer = await self._client.post(proxy.url, body)
        return str(answer["choices"][0]["message"]["content"])

    async def _until(self, proxy: JoinedProxy, url: str, *, is_healthy: bool) -> None:
        """Return when a proxy says of an instance that it is healthy, or that it isn't."""
        while True:
            with contextlib.suppress(RequestFailedError):
                instances = (await self._client.proxy_health(proxy.url)).instances
                if is_healthy == any(one.url == url and one.state == "healthy" for one in instances):
                    return
            await asyncio.sleep(_LOOK_SECONDS)


@asynccontextmanager
async def churning(
    model: Path, client: Client, forks: ForkServer, *, roles: Sequence[Role], proxies: int = 1, each: int = 1
) -> AsyncIterator[Churn]:
    """A fleet with ``each`` instances of each role, which has ended when the block does."""
    environment = os.environ | client.fleet_key.environment() | {"PYTHONUNBUFFERED": "1"}
    async with AsyncExitStack() as stack:
        fronts = [JoinedProxy(environment) for _ in range(proxies)]
        for one in fronts:
            stack.push_async_callback(one.close)
        await asyncio.gather(*(one.start() for one in fronts))
        instances = Instances(model, forks, environment)
        stack.callback(instances.close)
        churn = Churn(roles, fronts, instances, client)
        await asyncio.gather(*(churn.join(role) for role in roles for _ in range(each)))
        yield churn
