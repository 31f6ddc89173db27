"""All instances of a model and their proxy on this machine, as processes of one owner."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from chiasm.engine.config import Role
from chiasm.errors import ChiasmError
from chiasm.launch import health
from chiasm.launch.child import Child, ProcessState
from chiasm.launch.commands import (
    instance_command,
    proxy_command,
    proxy_environment,
)
from chiasm.launch.config import DeploymentConfig
from chiasm.launch.cores import check_cpus
from chiasm.launch.ports import HeldPort
from chiasm.launch.storage import DEFAULT_MAX_BYTES, StorageFolder

STOP_SECONDS = 3.5
"""For processes to end by themselves; then they are killed."""
_KILL_SECONDS = 1.0
_POLL_SECONDS = 0.05
_LOOPBACK = "127.0.0.1"
PROXY = "proxy"


class DeploymentNotReadyError(ChiasmError):
    """The instances were not all healthy in time; the message says which."""


@dataclass(frozen=True)
class ProcessStatus:
    """One process of a deployment at one moment."""

    name: str
    """``proxy``, or the role and a number: ``encoder-0``."""
    role: Role | None
    """None for the proxy."""
    url: str
    pid: int | None
    """None while no process runs."""
    state: ProcessState
    restarts: int
    """How often it was started again."""

    @property
    def memory_bytes(self) -> int | None:
        """What is resident of the process now, or None."""
        import psutil

        with contextlib.suppress(psutil.Error):
            return int(psutil.Process(self.pid).memory_info().rss) if self.pid else None
        return None


@dataclass
class _Member:
    role: Role | None
    address: HeldPort
    child: Child


class Deployment:
    """Runs what a :class:`DeploymentConfig` describes: each instance and the proxy as a child process.

    ::

        with Deployment(DeploymentConfig("demo")) as deployment:
            url = deployment.wait_ready()

    A child that dies is started again, on the same port, after a pause that doubles each time. One that cannot be started
    at all ends the deployment's start: ``check`` and ``wait_ready`` raise its error. When ``stop`` returns there is no
    process, no port and no folder left; when this process is killed, the children end by themselves.
    """

    def __init__(
        self,
        config: DeploymentConfig,
        *,
        on_change: Callable[[ProcessStatus], None] | None = None,
        on_line: Callable[[str, str], None] | None = None,
    ) -> None:
        """Find the model. Starts nothing; raises ConfigurationError when there is no such model.

        ``on_change`` is told of a process' every new state, ``on_line`` of each line (name of the process, text) that one
        logs. Both are called in other threads, and must return at once.
        """
        from chiasm.models import resolve_folder

        self.config = config
        for role in config.roles.values():
            check_cpus(role.cpus)
        check_cpus(config.proxy_cpus)
        self.folder = resolve_folder(config.model)
        """Of the checkpoint."""
        self._on_change = on_change or (lambda status: None)
        self._on_line = on_line or (lambda name, line: None)
        self._members: dict[str, _Member] = {}
        self._storage: StorageFolder | None = None
        self._was_ready = False

    # ---- life ---------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Deployment:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start all processes at once. Raises ConfigurationError, before any is started, when the port is in use."""
        config = self.config
        addresses: list[HeldPort] = []
        try:
            addresses.append(HeldPort(config.host, config.port))
            names = [(role, f"{role}-{index}") for role in config.roles for index in range(config.count(role))]
            addresses += [HeldPort(_LOOPBACK) for _ in names]
            storage, ec_max_bytes = config.shared_storage_path, config.ec_max_bytes or DEFAULT_MAX_BYTES
            if storage is None and config.exchanges_embeddings:
                self._storage = StorageFolder(config.ec_max_bytes)
                storage, ec_max_bytes = self._storage.path, self._storage.max_bytes
        except BaseException:
            for address in addresses:
                address.release()
            raise
        instances = list(zip(names, addresses[1:], strict=True))
        urls = [(role, address.url) for (role, _), address in instances]
        self._add(PROXY, None, addresses[0], proxy_command(config, addresses[0], urls), proxy_environment(config))
        for (role, name), address in instances:
            command = instance_command(config, self.folder, role, address, storage, ec_max_bytes)
            self._add(name, role, address, command, dict(os.environ))
        for member in self._members.values():
            member.child.start()

    def check(self) -> None:
        """Raise ConfigurationError if a process could not be started at all."""
        for member in list(self._members.values()):
            if member.child.failure is not None:
                raise member.child.failure

    def is_ready(self) -> bool:
        """Whether all processes run and the proxy finds every instance healthy. Asks the proxy; takes milliseconds."""
        members = [member for member in self._members.values() if member.role is not None]
        if not all(member.child.state is ProcessState.READY for member in self._members.values()):
            return False
        states = health.states(self.local_url)
        return all(states.get(member.address.url) == "healthy" for member in members)

    def wait_ready(self, timeout_seconds: float = 300.0) -> str:
        """Wait until ``is_ready``; returns the proxy's URL.

        Raises ConfigurationError as ``check`` does, and DeploymentNotReadyError when the time is over.
        """
        until = time.monotonic() + timeout_seconds
        while not self.is_ready():
            self.check()
            if time.monotonic() > until:
                states = ", ".join(f"{process.name} is {process.state}" for process in self.processes)
                raise DeploymentNotReadyError(f"not ready after {timeout_seconds:g} s: {states}")
            time.sleep(_POLL_SECONDS)
        return self.url

    def stop(self) -> None:
        """End all processes within 5 seconds, let their ports go and remove the folder made for them; idempotent."""
        children = [member.child for member in self._members.values()]
        for child in children:
            child.end()
        until = time.monotonic() + STOP_SECONDS
        for child in [child for child in children if not child.join(max(0.0, until - time.monotonic()))]:
            child.kill()
        until = time.monotonic() + _KILL_SECONDS
        for child in children:
            child.join(max(0.0, until - time.monotonic()))
        for member in self._members.values():
            member.address.release()
        if self._storage is not None:
            self._storage.remove()

    # ---- what there is ------------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """Of the proxy, as configured."""
        return self._members[PROXY].address.url

    @property
    def local_url(self) -> str:
        """Of the proxy, as this machine reaches it also where it listens on all addresses."""
        return self._members[PROXY].address.local_url

    def urls(self, role: Role) -> list[str]:
        """Of the instances of ``role``, in the order of their numbers."""
        return [member.address.url for member in self._members.values() if member.role is role]

    @property
    def processes(self) -> list[ProcessStatus]:
        """The proxy, then the instances."""
        return [self._status(name) for name in list(self._members)]

    def lines(self, name: str) -> list[str]:
        """The last lines that the process called ``name`` has logged, at most 200."""
        return list(self._members[name].child.lines)

    def _add(self, name: str, role: Role | None, address: HeldPort, command: list[str], env: dict[str, str]) -> None:
        child = Child(name, command, env, on_change=self._changed, on_line=self._on_line)
        self._members[name] = _Member(role, address, child)

    def _changed(self, child: Child) -> None:
        self._on_change(self._status(child.name))

    def _status(self, name: str) -> ProcessStatus:
        member = self._members[name]
        child = member.child
        return ProcessStatus(name, member.role, member.address.url, child.pid, child.state, child.restarts)
