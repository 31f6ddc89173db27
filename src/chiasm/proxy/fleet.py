"""The instances behind the proxy: what is known of each, which may be used, and which comes next.

InstanceState only: no clock and no I/O. ``probe`` feeds it with what instances say of themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from blake3 import blake3

from chiasm.wire import InstanceState, Role

WHOLE_ROLES = (Role.PD, Role.AGGREGATED)
"""Those that answer a request by themselves."""
PART_ROLES = (Role.PREFILL, Role.DECODE)
"""Those that answer a request together. A fleet has these or those."""
LANGUAGE_ROLES = WHOLE_ROLES + PART_ROLES

_USUAL_SEQUENCES = 256
"""What a decode instance takes at one time if it doesn't say."""
_FULL = 10.0
"""Added to the load of a decode instance that has no room: more than the load of any that has."""


@dataclass(frozen=True)
class Report:
    """What an instance says of itself."""

    models: tuple[str, ...]
    """Served names, the model's own first."""
    role: str | None = None
    """None for an engine that doesn't say (vLLM without chiasm's middleware)."""
    fingerprint: str = ""
    """Empty if the instance doesn't say."""
    ec_store: str = ""
    """Where embeddings go to and come from; empty if the instance doesn't say."""
    version: str = ""
    engine: str = ""
    """Name and version of an engine that isn't chiasm's own."""
    dtype: str = ""
    """Empty if the instance doesn't say."""
    takes_image_size: bool = True
    """Whether ``image_size`` sizes placeholders for it; else it needs the metadata that the encoder answers."""
    max_model_len: int | None = None
    max_items: int | None = None
    kv_connector: str = ""
    """What moves KV from P to D; empty if the instance moves none."""
    kv_blocks_total: int | None = None
    kv_blocks_free: int | None = None
    max_num_seqs: int | None = None


class Instance:
    """One instance, known by its URL."""

    def __init__(self, url: str, role: Role) -> None:
        self.url = url
        self.role = role
        self.report: Report | None = None
        """The latest; kept when the instance goes away."""
        self.failure: str | None = "not probed yet"
        """Why the last probe or connection failed."""
        self.mismatch: str | None = None
        self.draining = False
        self.seen_healthy = False
        self.outstanding = 0.0
        """Cost of the calls under way, in the unit of its role."""
        self.in_flight = 0
        self.last_taken = 0
        self.missed_probes = 0
        """Probes in a row that weren't answered in time."""
        self.reported_at = 0
        """Which report of all that the fleet has had is the latest of this instance."""
        self.store_since = 0
        """The report with which it named another store while it was healthy: a folder that was removed is made anew."""

    @property
    def state(self) -> InstanceState:
        if self.draining:
            return InstanceState.DRAINING
        if self.failure is not None or self.report is None:
            return InstanceState.UNHEALTHY if self.seen_healthy else InstanceState.STARTING
        return InstanceState.MISMATCHED if self.mismatch else InstanceState.HEALTHY

    @property
    def load(self) -> float:
        """What choosing goes by. Of a decode instance: the shares of its sequences and of its KV blocks that are taken.

        Sequences are counted here, call by call; blocks are as of the last probe.
        """
        if self.role is not Role.DECODE:
            return self.outstanding
        most = (self.report and self.report.max_num_seqs) or _USUAL_SEQUENCES
        total = (self.report and self.report.kv_blocks_total) or 0
        free = self.report.kv_blocks_free if self.report is not None and total else None
        blocks = 0.0 if free is None else 1 - free / total
        is_full = self.in_flight >= most or free == 0
        return self.in_flight / most + blocks + (_FULL if is_full else 0.0)

    @property
    def reason(self) -> str | None:
        """Why it isn't healthy."""
        return self.failure or self.mismatch

    def describe(self) -> dict[str, object]:
        report = self.report
        return {
            "url": self.url,
            "role": self.role.value,
            "state": self.state.value,
            "reason": self.reason,
            "model": report.models[0] if report else None,
            "version": report.version if report else None,
            "engine": (report.engine or None) if report else None,
            "outstanding_work": self.outstanding,
            "in_flight": self.in_flight,
        }


class Fleet:
    """All instances, and the one thing that they agree on."""

    def __init__(self) -> None:
        self._instances: dict[str, Instance] = {}
        self._agreed: Report | None = None
        self._is_confirmed = False
        """Whether an instance that answers has held to it."""
        self._taken = 0
        self._reports = 0
        self.on_remove: Callable[[Instance], None] = lambda instance: None

    # What there is

    @property
    def instances(self) -> list[Instance]:
        return list(self._instances.values())

    def get(self, url: str) -> Instance | None:
        return self._instances.get(url)

    def healthy(self, *roles: Role) -> list[Instance]:
        return [one for one in self._instances.values() if one.role in roles and one.state is InstanceState.HEALTHY]

    @property
    def hands_over(self) -> bool:
        """Whether requests go from a prefill to a decode instance; else each goes to one instance."""
        return any(one.role in PART_ROLES and not one.draining for one in self._instances.values())

    @property
    def hands_over_by_vllm(self) -> bool:
        """Whether its prefill and decode instances are vLLM's."""
        agreed = self._agreed
        return self.hands_over and agreed is not None and bool(agreed.kv_connector) and agreed.engine.startswith("vllm")

    @property
    def missing(self) -> Role | None:
        """The role of which an instance would have to be healthy for text to be answered; None if it can be."""
        if self.hands_over:
            return next((role for role in PART_ROLES if not self.healthy(role)), None)
        return None if self.healthy(*WHOLE_ROLES) else Role.PD

    @property
    def models(self) -> list[str]:
        """Names that can be asked for now."""
        if not self.hands_over:
            return list(self._names(*WHOLE_ROLES))
        decoded = self._names(Role.DECODE)
        return [name for name in self._names(Role.PREFILL) if name in decoded]

    def _names(self, *roles: Role) -> dict[str, None]:
        """What healthy instances of these roles serve, in the order in which they are listed."""
        return dict.fromkeys(name for one in self.healthy(*roles) if one.report for name in one.report.models)

    @property
    def fingerprint(self) -> str:
        """What names the model in identifiers: as the instances say, else made of the model's name."""
        if self._agreed is None:
            return ""
        return self._agreed.fingerprint or blake3(self._agreed.models[0].encode()).hexdigest()

    @property
    def max_items(self) -> int | None:
        """The lowest limit of media parts that a healthy instance has for a request."""
        limits = [
            one.report.max_items
            for one in self.healthy(*LANGUAGE_ROLES)
            if one.report is not None and one.report.max_items is not None
        ]
        return min(limits, default=None)

    # What happens to it

    def misfit(self, role: Role) -> str | None:
        """Why an instance of this role can't be added; None if it can."""
        others = WHOLE_ROLES if role in PART_ROLES else PART_ROLES if role in WHOLE_ROLES else ()
        found = {one.role for one in self._instances.values() if one.role in others and not one.draining}
        if not found:
            return None
        return (
            f"this fleet has {' and '.join(sorted(found))} instances, beside which none can be {role}: "
            "prefill and decode stand in place of pd and aggregated; remove those first, or run another proxy"
        )

    def add(self, url: str, role: Role) -> Instance:
        """A new instance, or the one of this URL if it was being removed."""
        instance = self._instances.get(url)
        if instance is None or instance.role is not role:
            instance = self._instances[url] = Instance(url, role)
        instance.draining = False
        self._agree()
        return instance

    def remove(self, instance: Instance) -> None:
        """Takes no new work from now on, and leaves when it has none."""
        instance.draining = True
        self._leave_if_idle(instance)
        self._agree()

    def succeed(self, instance: Instance, report: Report) -> None:
        """A probe succeeded."""
        self._reports += 1
        instance.reported_at = self._reports
        if instance.state is InstanceState.HEALTHY and instance.report and instance.report.ec_store != report.ec_store:
            instance.store_since = self._reports
        instance.report = report
        instance.failure = None
        self._agree()

    def fail(self, instance: Instance, reason: str) -> None:
        """A probe or a connection failed."""
        instance.failure = reason
        self._agree()

    def choose(
        self,
        *roles: Role,
        model: str | None = None,
        exclude: Collection[Instance] = (),
        ahead: Callable[[Instance], float] = lambda instance: 0.0,
    ) -> Instance | None:
        """The healthy instance with the least load, and of equals the one that waited longest.

        ``ahead`` adds work that is decided but not taken yet.
        """
        candidates = [
            one
            for one in self.healthy(*roles)
            if one not in exclude and (model is None or (one.report is not None and model in one.report.models))
        ]
        return min(candidates, key=lambda one: (one.load + ahead(one), one.last_taken), default=None)

    @contextmanager
    def working(self, instance: Instance, cost: float) -> Iterator[None]:
        """Counts a call of this cost as under way."""
        self._taken += 1
        instance.last_taken = self._taken
        instance.outstanding += cost
        instance.in_flight += 1
        try:
            yield
        finally:
            instance.in_flight -= 1
            instance.outstanding = instance.outstanding - cost if instance.in_flight else 0.0
            self._leave_if_idle(instance)

    def _leave_if_idle(self, instance: Instance) -> None:
        if instance.draining and not instance.in_flight and self._instances.get(instance.url) is instance:
            del self._instances[instance.url]
            self.on_remove(instance)

    # What it agrees on

    def _agree(self) -> None:
        """Judge every reachable instance against what the fleet serves.

        Those that answer have the first word, encoders follow: what encoders alone have agreed on goes when the first of
        those that answer says otherwise. Else it stays as long as one instance holds to it. An instance that names
        another store than before is not judged by it until those that hold to the old one have been asked again: where the
        folder was made anew, they will say the same.
        """
        members: list[tuple[Instance, Report]] = []
        for instance in sorted(self._instances.values(), key=lambda one: one.role is Role.ENCODER):
            instance.mismatch = None
            if instance.draining or instance.failure is not None or instance.report is None:
                continue
            if instance.report.role not in {None, instance.role.value}:
                instance.mismatch = f"it says that its role is {instance.report.role}, not {instance.role.value}"
                continue
            if instance.report.role is None and instance.role in PART_ROLES:
                instance.mismatch = (
                    "it doesn't say its role; the handover from prefill to decode needs chiasm's own instances, or vLLM's "
                    "with chiasm's middleware"
                )
                continue
            members.append((instance, instance.report))
        agreed = self._agreed
        answering = [report for instance, report in members if instance.role in LANGUAGE_ROLES]
        holders = answering if answering and not self._is_confirmed else [report for _, report in members]
        if agreed is not None and all(_difference(agreed, report) for report in holders):
            agreed = None
            self._is_confirmed = False
        movers = [report for _, report in members if report.kv_connector]
        if agreed is not None and movers and all(_moves_kv_by(agreed) != _moves_kv_by(report) for report in movers):
            agreed = replace(agreed, kv_connector="", engine="")  # encoders alone hold to it
        for instance, report in members:
            if agreed is None:
                agreed = report
            instance.mismatch = _difference(agreed, report)
            if instance.mismatch is not None and any(
                other.reported_at < instance.store_since and known.ec_store == agreed.ec_store
                for other, known in members
            ):
                instance.mismatch = _difference(agreed, replace(report, ec_store=""))
            if instance.mismatch is None:
                instance.seen_healthy = True
                self._is_confirmed = self._is_confirmed or instance.role in LANGUAGE_ROLES
                agreed = replace(
                    agreed,
                    fingerprint=agreed.fingerprint or report.fingerprint,
                    ec_store=agreed.ec_store or report.ec_store,
                    dtype=agreed.dtype or report.dtype,
                    kv_connector=agreed.kv_connector or report.kv_connector,
                    engine=agreed.engine if agreed.kv_connector else report.engine,
                )
        self._agreed = agreed or self._agreed


def _difference(agreed: Report, report: Report) -> str | None:
    if not set(agreed.models) & set(report.models):
        return f"it serves {report.models[0]}, the fleet {agreed.models[0]}"
    if agreed.fingerprint and report.fingerprint and agreed.fingerprint != report.fingerprint:
        if agreed.dtype and report.dtype and agreed.dtype != report.dtype:
            return f"its dtype is {report.dtype}, the fleet's {agreed.dtype}"
        return f"its fingerprint ({_named_by(agreed, report)}) differs from the fleet's"
    if agreed.ec_store and report.ec_store and agreed.ec_store != report.ec_store:
        return "it exchanges embeddings through another store than the fleet"
    if agreed.kv_connector and report.kv_connector and _moves_kv_by(agreed) != _moves_kv_by(report):
        return f"it moves KV by {_moves_kv_by(report)}, the fleet by {_moves_kv_by(agreed)}"
    return None


def _named_by(one: Report, other: Report) -> str:
    """What of the things that a fingerprint is made of may differ."""
    return "model or processor" if one.dtype and one.dtype == other.dtype else "model, processor or dtype"


def _moves_kv_by(report: Report) -> str:
    """Connectors of one name don't understand each other across engines, nor across versions of vLLM."""
    return f"{report.kv_connector} of {report.engine or 'chiasm'}"
