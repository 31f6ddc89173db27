"""All instances of a model and their proxy on this machine, as processes of one owner."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType

from chiasm.cores import check_cpus
from chiasm.errors import ChiasmError, ConfigurationError
from chiasm.extras import Extra, require
from chiasm.fleet_key import FleetKey, make_fleet_key, read_fleet_key
from chiasm.launch import fork_server
from chiasm.launch.arrangement import arrange
from chiasm.launch.child import Child, ProcessState, Start, start_process
from chiasm.launch.config import DeploymentConfig, EngineKind
from chiasm.launch.devices import Placements, others_serve
from chiasm.launch.folders import DEFAULT_MAX_BYTES, LockedFolder, StorageFolder, in_memory, memory_for_embeddings
from chiasm.launch.fork_server import ForkServer
from chiasm.launch.plan import ProcessPlan, Surroundings, plan_instances, plan_proxy
from chiasm.launch.ports import HeldPort, instance_infos, load_progress, read_metric
from chiasm.launch.scaling import STEP_SECONDS, EncoderNumber, ProxySays, Scaling
from chiasm.proxy.config import ProxyConfig
from chiasm.proxy.encoder_demand import DESIRED_METRIC
from chiasm.wire import InstanceInfo, InstanceState, Role

PROXY_STOP_SECONDS = 1.5
"""Time for the proxy to end at once, and tell its clients why."""
STOP_SECONDS = 3.5
"""Time for instances to end at once; what hasn't ended then is killed."""
_KILL_SECONDS = 1.0
_MISMATCH_SECONDS = 1.0
"""Time in which instances report again, after which they would fit if they could."""
_HEALTHY_SECONDS = 60.0
"""Time for instances that say they are ready to be healthy."""
_POLL_SECONDS = 0.05
_SCRATCH_PREFIX = "chiasm-serve-"
_ENCODERS = "encoders.json"


class DeploymentNotReadyError(ChiasmError):
    """Not all instances were healthy in time; the message says which."""


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
    progress: str = ""
    """How far it is with loading its model, or that it drains, in words; empty if there is nothing to say."""

    @property
    def memory_bytes(self) -> int | None:
        """Resident memory of the process now, or None."""
        import psutil

        with contextlib.suppress(psutil.Error):
            return int(psutil.Process(self.pid).memory_info().rss) if self.pid else None
        return None


@dataclass
class _Member:
    plan: ProcessPlan
    child: Child
    is_spare: bool
    """Whether it is an encoder that runs only while it is needed, so that the others can serve without it."""
    progress: str = ""


class Deployment:
    """Runs what a :class:`DeploymentConfig` describes: each instance and the proxy as a child process.

    ::

        with Deployment(DeploymentConfig("demo")) as deployment:
            url = deployment.wait_ready()

    Where the number of encoders is a range, they come and go as the proxy desires.

    A child that dies is started again, on the same port, after a pause that doubles each time. One that cannot be started
    at all ends the deployment's start: ``check`` and ``wait_ready`` raise its error. Only a GPU can be lost: where its roles
    have instances on other GPUs too, these serve without it, and a line says so. When ``stop`` returns, no process, port or
    folder is left; when this process is killed, the children end by themselves.
    """

    def __init__(
        self,
        config: DeploymentConfig,
        *,
        fleet_key: FleetKey | None = None,
        forks: ForkServer | None = None,
        on_change: Callable[[ProcessStatus], None] | None = None,
        on_line: Callable[[str, str], None] | None = None,
    ) -> None:
        """Find the model, and apply the layout to the devices of this machine. Starts nothing.

        Raises ConfigurationError if there is no such model, engine or device, if the engine is not installed, or if the fleet
        key that the configuration or the environment gives isn't fit. ``fleet_key`` is taken instead of that one.
        Instances are forks of ``forks``, which others may use too; without it, the deployment has one of its own.

        ``on_change`` is called at every new state of a process, ``on_line`` with each line (name of the process, text) that one
        logs. Both are called in other threads and must return at once.
        """
        from chiasm.models import resolve_folder

        if config.engine is EngineKind.CHIASM:
            require(Extra.ENGINE, "The built-in engine")
        self.config = config
        self.fleet_key = fleet_key or read_fleet_key(config.fleet_key_file) or FleetKey([make_fleet_key()])
        """By which the proxy and the instances know each other, so that other users of this machine can't call instances."""
        self._supervisor_key = secrets.token_hex(32)
        for role in config.roles.values():
            check_cpus(role.cpus)
        check_cpus(config.proxy_cpus)
        self.folder = resolve_folder(config.model)
        """Folder of the checkpoint."""
        self.arrangement = arrange(config, self.folder)
        """Which instances there are, and where each of them computes."""
        self._forks = forks or ForkServer()
        self._has_forks = forks is None
        self._on_change = on_change or (lambda status: None)
        self._on_line = on_line or (lambda name, line: None)
        self._members: dict[str, _Member | None] = {}
        """All that may run, by name in their order; None for an encoder that isn't needed. After the start the names stay the
        same, so one thread may look through them while another starts and forgets encoders."""
        self._lost: set[str] = set()
        self._unhealthy_since: float | None = None
        self._held: list[HeldPort] = []
        """The proxy's port, and then those of the instances."""
        self._storage: StorageFolder | None = None
        self._scratch: LockedFolder | None = None
        self._scaling: Scaling | None = None

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
        """Start all processes at once.

        Raises ConfigurationError, before any is started, if the port is in use or a setting cannot work.
        """
        plans = self._plan()
        self._members = {plan.name: None for plan in plans}
        if self.arrangement.config.scales:
            encoders = [plan for plan in plans if plan.role is Role.ENCODER]
            plans = [plan for plan in plans if plan.role is not Role.ENCODER]
            self._scaling = self._scaling_of(encoders)
            self._scaling.start()
        for plan in plans:
            self._begin(plan)

    def _begin(self, plan: ProcessPlan) -> Child:
        """Start a process."""
        child = Child(
            plan.name,
            plan.command,
            plan.environment | self.fleet_key.environment(),
            configuration=plan.configuration,
            start=self._start_of(plan),
            on_change=partial(self._changed, plan),
            on_line=self._on_line,
        )
        self._members[plan.name] = _Member(plan, child, self.arrangement.is_spare(plan.role, plan.index))
        child.start()
        return child

    def _forget(self, plan: ProcessPlan) -> None:
        """Note that a process has ended that isn't needed."""
        self._members[plan.name] = None

    @property
    def _running(self) -> list[_Member]:
        """What runs, or is to run: the proxy, then the instances."""
        return [member for member in self._members.values() if member is not None]

    def _scaling_of(self, encoders: Sequence[ProcessPlan]) -> Scaling:
        """Return what starts and drains encoders, of which these are all."""
        config = self.arrangement.config
        by_index = {plan.index: plan for plan in encoders}
        calm = config.proxy_settings.get("scale_down_seconds", ProxyConfig.scale_down_seconds)
        return Scaling(
            [by_index[index] for index in self.arrangement.encoders],
            EncoderNumber(config.least_encoders, len(encoders), min(calm, STEP_SECONDS)),
            self._encoders_file,
            end_seconds=config.shutdown_timeout_seconds,
            begin=self._begin,
            forget=self._forget,
            ask=self._ask_proxy,
            say=partial(self._on_line, "serve"),
        )

    def _ask_proxy(self, wants_known: bool) -> ProxySays:
        try:
            desired = read_metric(self.local_url, DESIRED_METRIC, self._supervisor_key, role=Role.ENCODER.value)
            return ProxySays(desired, self._infos().keys() if wants_known else ())
        except ConfigurationError:  # the file of admin keys isn't fit just now, which the proxy's log says
            return ProxySays(None, ())

    @property
    def _encoders_file(self) -> Path:
        """Where the proxy finds encoders that come and go."""
        assert self._scratch is not None
        return self._scratch.path / _ENCODERS

    def preview(self) -> list[ProcessPlan]:
        """Return what would be started, the proxy first, and keep nothing of it: a start may take other free ports.

        Raises ConfigurationError as ``start`` does.
        """
        try:
            return self._plan()
        finally:
            self._release()

    def _plan(self) -> list[ProcessPlan]:
        """Take the ports and folders of all processes."""
        config = self.arrangement.config
        try:
            address = HeldPort(config.host, config.port, scheme=config.scheme)
            self._held = [address]
            instances = plan_instances(config, self.folder, self.placements, self._surroundings(), self._held)
            listed_in = self._encoders_file if config.scales else None
            urls = [
                (plan.role, plan.address.url)
                for plan in instances
                if plan.role is not None and (listed_in is None or plan.role is not Role.ENCODER)
            ]
            return [
                plan_proxy(config, address, urls, listed_in=listed_in, supervisor_key=self._supervisor_key),
                *instances,
            ]
        except BaseException:
            self._release()
            raise

    def _start_of(self, plan: ProcessPlan) -> Start:
        """Return how to start a process. On a GPU each imports for itself: a fork of a process that has used CUDA can't."""
        if plan.role is None or not self.arrangement.on_cpu or not fork_server.is_available():
            return start_process
        return partial(self._forks.start, self.folder)

    def _surroundings(self) -> Surroundings:
        config = self.arrangement.config
        storage, ec_max_bytes = config.shared_storage_path, config.ec_max_bytes or DEFAULT_MAX_BYTES
        if config.makes_folder:
            self._storage = StorageFolder(config.ec_max_bytes)
            storage, ec_max_bytes = self._storage.path, self._storage.max_bytes
        elif storage is None and config.ec_max_bytes is None:
            ec_max_bytes = memory_for_embeddings(config.count(Role.ENCODER))
        if config.scales or any(one.shared or one.core_share for one in self.placements.values()):
            self._scratch = LockedFolder(_SCRATCH_PREFIX, in_memory())
        return Surroundings(storage, ec_max_bytes, self.scratch)

    def check(self) -> None:
        """Raise ConfigurationError if a process could not be started at all, and the others cannot serve without it."""
        failed = [one for one in self._running if one.child.failure is not None and not one.is_spare]
        lost = [(member.plan.role, member.plan.index) for member in failed if member.plan.role is not None]
        for member in failed:
            name, failure, gpus = member.plan.name, member.child.failure, self._gpus_of(member.plan)
            assert failure is not None
            if len(lost) < len(failed) or not others_serve(self.placements, lost):
                raise ConfigurationError(f"{name} on GPU {gpus}: {failure.message}") if gpus else failure
            if name not in self._lost:
                self._lost.add(name)
                self._on_line(name, f"is lost with GPU {gpus}, and the others serve without it: {failure.message}")

    def is_ready(self) -> bool:
        """Return whether all processes run and the proxy finds every instance healthy; asking it takes milliseconds.

        Instances that ``check`` has given up with their GPU don't count. Raises ConfigurationError if instances run that can't
        work together, or that don't get healthy.
        """
        needed = [one for one in self._running if one.plan.name not in self._lost and not one.is_spare]
        if not all(member.child.state is ProcessState.READY for member in needed):
            self._unhealthy_since = None
            return False
        infos = self._infos()
        found = {one.plan.name: infos.get(one.plan.address.url, InstanceInfo()) for one in needed if one.plan.role}
        unhealthy = {name: info for name, info in found.items() if info.state != InstanceState.HEALTHY}
        if unhealthy:
            self._check_unhealthy(unhealthy)
        return not unhealthy

    def _infos(self) -> Mapping[str, InstanceInfo]:
        return instance_infos(self.local_url, self._supervisor_key)

    def _check_unhealthy(self, unhealthy: Mapping[str, InstanceInfo]) -> None:
        """Raise ConfigurationError if instances that run have not been healthy for so long that they never will be."""
        now = time.monotonic()
        self._unhealthy_since = self._unhealthy_since or now
        for name, info in unhealthy.items():
            if info.state == InstanceState.MISMATCHED and now - self._unhealthy_since > _MISMATCH_SECONDS:
                raise ConfigurationError(
                    f"{name} doesn't fit the other instances: {info.reason}. Give them the same options."
                )
            if now - self._unhealthy_since > _HEALTHY_SECONDS:
                reason = info.reason or "the proxy says nothing about it"
                raise ConfigurationError(f"{name} runs, but has not been healthy for {_HEALTHY_SECONDS:g} s: {reason}.")

    def waiting_for(self) -> str:
        """Return in words what keeps the deployment from being ready; empty if all processes run."""
        waiting = [one for one in self.processes if one.state is not ProcessState.READY]
        return ", ".join(f"{one.name} ({one.progress or one.state})" for one in waiting)

    def look(self) -> None:
        """Ask the instances that start how far they are; takes up to 0.2 s for each that is too busy to answer."""
        for member in self._running:
            is_loading = member.plan.role is not None and member.child.state is ProcessState.STARTING
            member.progress = load_progress(member.plan.address.url) if is_loading else ""

    def wait_ready(self, timeout_seconds: float = 300.0) -> str:
        """Wait until ``is_ready``, and return the proxy's URL.

        Raises ConfigurationError as ``check`` does, and DeploymentNotReadyError after ``timeout_seconds``.
        """
        until = time.monotonic() + timeout_seconds
        while not self.is_ready():
            self.check()
            if time.monotonic() > until:
                waiting = self.waiting_for() or "the proxy does not find every instance healthy"
                raise DeploymentNotReadyError(f"Not ready after {timeout_seconds:g} s: {waiting}.")
            time.sleep(_POLL_SECONDS)
        return self.url

    def drain(self, is_hurried: Callable[[], bool]) -> None:
        """End processes when nothing runs in them: the proxy, which takes no more requests, and then the instances.

        Returns when they have ended, after ``config.shutdown_timeout_seconds``, or when ``is_hurried``; ``stop`` does the rest.
        vLLM's instances are left to it, because vLLM takes seconds to end even when nothing runs.
        """
        if self._scaling is not None:
            self._scaling.close()
        until = time.monotonic() + self.config.shutdown_timeout_seconds
        proxy, instances = self._in_order()
        for children in (proxy, instances) if self.config.engine is EngineKind.CHIASM else (proxy,):
            for child in children:
                child.end()
            if children is instances and self._has_forks:
                self._forks.close()  # what is yet to be forked would end at once, and its imports take seconds
            while not all(child.join(0.0) for child in children):
                if time.monotonic() > until or is_hurried():
                    return
                time.sleep(_POLL_SECONDS)

    def stop(self) -> None:
        """End all processes within 5 seconds, release their ports and remove the folders made for them; idempotent.

        What still runs ends with an error.
        """
        if self._scaling is not None:
            self._scaling.close()
        if self._has_forks:
            self._forks.close()
        proxy, instances = self._in_order()
        children = [*proxy, *instances]
        for some, seconds in ((proxy, PROXY_STOP_SECONDS), (instances, STOP_SECONDS)):
            for child in some:
                child.end(at_once=True)
            until = time.monotonic() + seconds
            for child in some:
                child.join(max(0.0, until - time.monotonic()))
        for child in [child for child in children if not child.join(0.0)]:
            child.kill()
        until = time.monotonic() + _KILL_SECONDS
        for child in children:
            child.join(max(0.0, until - time.monotonic()))
        self._release()

    def _in_order(self) -> tuple[list[Child], list[Child]]:
        """Return the processes in the order in which they end: the proxy, then the instances."""
        running = self._running
        return [one.child for one in running if one.plan.role is None], [
            one.child for one in running if one.plan.role is not None
        ]

    def _release(self) -> None:
        """Release ports and folders."""
        for address in self._held:
            address.release()
        for folder in (self._storage, self._scratch):
            if folder is not None:
                folder.remove()

    # ---- what runs ----------------------------------------------------------------------------------------------------

    @property
    def placements(self) -> Placements:
        """Where each instance computes."""
        return self.arrangement.placements

    @property
    def url(self) -> str:
        """Base URL of the proxy, as configured."""
        return self._held[0].url

    @property
    def local_url(self) -> str:
        """Base URL of the proxy for clients on this machine."""
        return self._held[0].local_url

    @property
    def scratch(self) -> Path | None:
        """The folder through which instances on the same device agree, while it runs; None where none share a device."""
        return self._scratch.path if self._scratch is not None else None

    def urls(self, role: Role) -> list[str]:
        """Return the base URLs of the instances of ``role``, in the order of their numbers."""
        return [member.plan.address.url for member in self._running if member.plan.role is role]

    @property
    def processes(self) -> list[ProcessStatus]:
        """The proxy, then the instances."""
        return [_status(one.plan, one.child, one.progress) for one in self._running]

    def lines(self, name: str) -> list[str]:
        """Return the last lines that the process called ``name`` has logged, at most 200."""
        return next((list(one.child.lines) for one in self._running if one.plan.name == name), [])

    def _gpus_of(self, plan: ProcessPlan) -> str:
        """Return the names of an instance's GPUs; empty for an instance on CPU and the proxy."""
        return ", ".join(self.placements[plan.role, plan.index].devices) if plan.role is not None else ""

    def _changed(self, plan: ProcessPlan, child: Child) -> None:
        gpus = self._gpus_of(plan)
        if child.state is ProcessState.WAITING and gpus:
            self._on_line(child.name, f"computed on GPU {gpus}; if that is lost, the instances on other GPUs serve on")
        self._on_change(_status(plan, child))


def _status(plan: ProcessPlan, child: Child, loaded: str = "") -> ProcessStatus:
    words = {ProcessState.STARTING: loaded, ProcessState.READY: "draining" if child.is_ending else ""}
    progress = words.get(child.state, "")
    return ProcessStatus(plan.name, plan.role, plan.address.url, child.pid, child.state, child.restarts, progress)
