"""The instances behind the proxy: what each last said, which can be used, and which gets the next call.

State only: no clock and no I/O. ``probe`` feeds it with what instances report about themselves. Whoever wants to know of
changes adds a listener. Instants are seconds on the caller's clock.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import NamedTuple

from blake3 import blake3

from chiasm.proxy.agreement import LANGUAGE_ROLES, PART_ROLES, WHOLE_ROLES, Agreement, Member, agree
from chiasm.proxy.instance import Instance
from chiasm.wire import Costs, Health, InstanceState, Lease, Load, Role

_EXPECTED_SECONDS = 60.0
"""For so long after it was lost, an instance is expected to come back."""
_DERIVED = ("hands_over", "models", "text_limit")
"""Properties of the fleet that are computed once and kept until an instance says something or is gone."""
_ALTERNATIVES = {Role.PD: WHOLE_ROLES, Role.AGGREGATED: WHOLE_ROLES, Role.ENCODER: (Role.ENCODER, Role.AGGREGATED)}
"""Roles that do what a role does."""


class TextLimit(NamedTuple):
    """How much text a language instance can take at most."""

    tokens: int
    """Its context, answer included."""
    longest_token: int
    """In characters."""

    def tokens_of(self, characters: int) -> int:
        """Return how many tokens a text of so many characters has at least."""
        return characters // self.longest_token


Listener = Callable[[Instance], None]


class Fleet:
    """All instances, and what they agree on."""

    def __init__(self) -> None:
        self._instances: dict[str, Instance] = {}
        self._healthy: dict[tuple[Role, ...], Sequence[Instance]] = {}
        self._agreement: Agreement | None = None
        self._farewells: dict[Role, float] = {}
        """When an instance of a role said last that it ends."""
        self._added = 0
        self._taken = 0
        self._reports = 0
        self.on_add: Callable[[Instance], None] = lambda instance: None
        self.on_remove: Callable[[Instance], None] = lambda instance: None
        self.on_load: Callable[[Instance], None] = lambda instance: None
        """Called when an instance has said what its load is."""
        self.listeners: list[Listener] = []
        """Called after each change of an instance's state, or of the reason why it is mismatched."""

    # ---- what there is -------------------------------------------------------------------------------------------------

    @property
    def instances(self) -> list[Instance]:
        return list(self._instances.values())

    def get(self, url: str) -> Instance | None:
        return self._instances.get(url)

    def healthy(self, *roles: Role) -> Sequence[Instance]:
        """Return the same object until an instance says something or is gone."""
        found = self._healthy.get(roles)
        if found is None:
            instances = self._instances.values()
            found = tuple(one for one in instances if one.role in roles and one.state is InstanceState.HEALTHY)
            self._healthy[roles] = found
        return found

    @cached_property
    def hands_over(self) -> bool:
        """Whether requests go from a prefill to a decode instance; otherwise each goes to one instance."""
        return any(one.role in PART_ROLES and not one.draining for one in self._instances.values())

    @property
    def hands_over_by_vllm(self) -> bool:
        """Whether its prefill and decode instances are vLLM's."""
        agreed = self._agreement.health if self._agreement else Health()
        return self.hands_over and bool(agreed.kv_connector) and agreed.engine.startswith("vllm")

    @property
    def missing(self) -> Role | None:
        """The role that lacks a healthy instance, without which text can't be answered; None if it can."""
        if self.hands_over:
            return next((role for role in PART_ROLES if not self.healthy(role)), None)
        return None if self.healthy(*WHOLE_ROLES) else Role.PD

    def lacking(self, *, has_images: bool) -> Role | None:
        """Return the role that lacks a healthy instance, without which a request can't be answered; None if it can."""
        if (missing := self.missing) or not has_images or self.healthy(Role.ENCODER):
            return missing
        return None if self.healthy(Role.AGGREGATED) and not self.hands_over else Role.ENCODER

    def expects(self, role: Role, now: float) -> bool:
        """Return whether an instance that does what this role does is likely to be healthy soon.

        It is if it was never healthy yet, was lost a short time ago, or says that it is starting. Where one has said that it
        ends, so is the one that takes its place.
        """
        if any(_is_recent(self._farewells.get(one), now) for one in _substitutes(role)):
            return True
        return any(
            one.state is InstanceState.STARTING
            or (one.state is InstanceState.UNHEALTHY and one.says_starting)
            or (_may_return(one) and _is_recent(one.lost_at, now))
            for one in self._instances.values()
            if one.role in _substitutes(role)
        )

    def has(self, role: Role) -> bool:
        """Return whether there is an instance, in whatever state, that does what this role does."""
        return any(one.role in _substitutes(role) for one in self._instances.values())

    def has_substitute(self, instance: Instance) -> bool:
        """Return whether another instance is healthy that does what this one does."""
        return any(one is not instance for one in self.healthy(*_substitutes(instance.role)))

    @cached_property
    def models(self) -> list[str]:
        """Names that requests can ask for now."""
        if not self.hands_over:
            return list(self._names(*WHOLE_ROLES))
        decoded = self._names(Role.DECODE)
        return [name for name in self._names(Role.PREFILL) if name in decoded]

    def _names(self, *roles: Role) -> dict[str, None]:
        """Names that healthy instances of these roles serve, in the order in which they are listed."""
        return dict.fromkeys(name for one in self.healthy(*roles) for name in one.models)

    @property
    def fingerprint(self) -> str:
        """What names the model in identifiers: the instances' fingerprint; if none reports it, a hash of the model's name."""
        if self._agreement is None:
            return ""
        agreed = self._agreement.health
        return agreed.fingerprint or blake3(agreed.model.encode()).hexdigest()

    @property
    def max_items(self) -> int | None:
        """The lowest limit of images per request among healthy language instances."""
        healths = [one.health for one in self.healthy(*LANGUAGE_ROLES) if one.health]
        # vLLM reports 0 if it has loaded no vision tower; it takes embeddings all the same.
        return min((health.max_items for health in healths if health.max_items), default=None)

    @property
    def max_model_len(self) -> int | None:
        """The shortest context among healthy language instances."""
        healths = [one.health for one in self.healthy(*LANGUAGE_ROLES) if one.health]
        return min((health.max_model_len for health in healths if health.max_model_len is not None), default=None)

    @cached_property
    def text_limit(self) -> TextLimit | None:
        """The longest text that a healthy language instance can take; None if one of them doesn't say."""
        healths = [one.health for one in self.healthy(*LANGUAGE_ROLES) if one.health]
        limits = [
            TextLimit(health.max_model_len, health.longest_token)
            for health in healths
            if health.max_model_len and health.longest_token
        ]
        if not limits or len(limits) < len(healths):
            return None
        return max(limits, key=lambda limit: limit.tokens * limit.longest_token)

    # ---- what happens to it --------------------------------------------------------------------------------------------

    def misfit(self, role: Role) -> str | None:
        """Return why an instance of this role can't be added; None if it can."""
        others = WHOLE_ROLES if role in PART_ROLES else PART_ROLES if role in WHOLE_ROLES else ()
        found = {one.role for one in self._instances.values() if one.role in others and not one.draining}
        if not found:
            return None
        return (
            f"This fleet has {' and '.join(sorted(found))} instances, which can't be combined with {role} instances: prefill "
            "and decode take the place of pd and aggregated. Remove those first, or run another proxy."
        )

    def add(self, url: str, role: Role) -> Instance:
        """Return a new instance, or the one of this URL if it was being removed."""
        instance = self._instances.get(url)
        is_new = instance is None or instance.role is not role
        if instance is None or instance.role is not role:
            self._added += 1
            instance = self._instances[url] = Instance(url, role, self._added)
        instance.draining = False
        self._judge()
        if is_new:
            self.on_add(instance)
        return instance

    def remove(self, instance: Instance) -> None:
        """Give it no new work from now on, and remove it when its last call has ended."""
        instance.draining = True
        instance.lease = instance.lease_fault = None
        self._leave_if_idle(instance)
        self._judge()

    def succeed(self, instance: Instance, health: Health, models: tuple[str, ...] = ()) -> None:
        """Take what an instance answered to a probe; ``models`` are the names that it serves, if there are several."""
        self._reports += 1
        instance.reported_at = self._reports
        known = instance.health
        if instance.state is InstanceState.HEALTHY and known is not None and known.ec_store != health.ec_store:
            instance.moved_at = self._reports
        moves = health.device_id != instance.device_id
        instance.health = health
        instance.incarnation = health.incarnation
        if moves or known is None or known.costs != health.costs:
            self._share_costs(instance, moves=moves)
        instance.models = models or (health.model,)
        instance.failure = None
        self._note_load(instance, health.load)
        instance.is_silent = instance.says_starting = instance.says_draining = False
        instance.lost_at = None
        self._judge()

    def fail(
        self,
        instance: Instance,
        reason: str,
        now: float,
        *,
        is_silent: bool = False,
        says_starting: bool = False,
        says_draining: bool = False,
        incarnation: str = "",
    ) -> None:
        """Note that a probe or a connection failed; ``is_silent`` if it hasn't responded at all."""
        instance.failure = reason
        instance.incarnation = incarnation or instance.incarnation
        has_drained = instance.says_draining and not says_draining
        instance.is_silent = is_silent
        instance.says_starting = says_starting
        instance.says_draining = says_draining
        if instance.lost_at is None or has_drained:
            instance.lost_at = now
        self._judge()

    def note_lease(self, instance: Instance, lease: Lease | None, fault: str | None = None) -> None:
        """Take what an instance said with its lease; ``fault`` says why the lease doesn't count."""
        if lease is not None and lease is not instance.lease:
            self._note_load(instance, lease.load)
        instance.lease, instance.lease_fault = lease, fault
        self._judge()

    def note_farewell(self, instance: Instance, now: float) -> None:
        """Take that an instance says with its lease that it ends, as it does to be restarted or replaced."""
        if instance.seen_healthy:
            self._farewells[instance.role] = now

    def _share_costs(self, instance: Instance, *, moves: bool) -> None:
        """Take what work costs the instance to be what it costs the others of its role on its device; ``moves`` if that is new.

        They compute equally fast. If each learned alone, the one that has had work on an idle device would seem faster than
        the others, and would get all of it until it is busy.
        """
        known = [one for one in self._instances.values() if one.role is instance.role and one.health]
        alike = [one for one in known if one is instance or (one.device_id and one.device_id == instance.device_id)]
        if moves:
            others = [one.costs for one in alike if one is not instance]
            instance.costs.learn_with(others[0] if others else None)
        reported = [one.health.costs for one in alike if one.health and one.health.costs]
        instance.costs.reported = reported[0] if reported else Costs()

    def _note_load(self, instance: Instance, load: Load | None) -> None:
        if load is not None:
            instance.said_load = load
            self.on_load(instance)

    def note_listing(self, instance: Instance, sources: tuple[str, ...], *, is_ending: bool) -> None:
        """Take who says that an instance belongs to the fleet, and whether they say that it ends."""
        if (instance.sources, instance.is_ending) != (sources, is_ending):
            instance.sources, instance.is_ending = sources, is_ending
            self._judge()

    def candidates(self, *roles: Role, model: str | None, exclude: Collection[Instance]) -> list[Instance]:
        """Return the healthy instances of these roles that serve the model, if one is named, but none of ``exclude``."""
        return [one for one in self.healthy(*roles) if one not in exclude and (model is None or model in one.models)]

    def choose(self, *roles: Role, model: str | None = None, exclude: Collection[Instance] = ()) -> Instance | None:
        """Return the healthy instance with the least load; among equals, the one that has waited longest for work."""
        candidates = self.candidates(*roles, model=model, exclude=exclude)
        return min(candidates, key=lambda one: (one.load, one.last_taken), default=None)

    @contextmanager
    def working(self, instance: Instance, cost: float) -> Iterator[None]:
        """A block during which a call of this cost counts as under way."""
        self.begin(instance, cost)
        try:
            yield
        finally:
            self.end(instance, cost)

    def begin(self, instance: Instance, cost: float) -> None:
        """Count a call of this cost as under way until ``end``."""
        self._taken += 1
        instance.last_taken = self._taken
        instance.outstanding += cost
        instance.in_flight += 1

    def end(self, instance: Instance, cost: float) -> None:
        """Count a call no more."""
        instance.in_flight -= 1
        instance.outstanding = instance.outstanding - cost if instance.in_flight else 0.0
        self._leave_if_idle(instance)

    def _leave_if_idle(self, instance: Instance) -> None:
        if instance.draining and not instance.in_flight and self._instances.get(instance.url) is instance:
            del self._instances[instance.url]
            self.on_remove(instance)

    # ---- agreement -----------------------------------------------------------------------------------------------------

    def _judge(self) -> None:
        """Judge every reachable instance again."""
        self._forget()
        reachable: list[tuple[Instance, Member]] = []
        for instance in self._instances.values():
            instance.mismatch = None
            if instance.health is not None and instance.failure is None and not instance.draining:
                if twin := _twin(instance, reachable):
                    instance.mismatch = f"it is the same process as {twin.url}; name it by one URL"
                elif instance.lease_fault is None:
                    reachable.append((instance, _member(instance, instance.health)))
        self._agreement, mismatches = agree(self._agreement, [member for _, member in reachable])
        for (instance, _), mismatch in zip(reachable, mismatches, strict=True):
            instance.mismatch = mismatch
            instance.seen_healthy = instance.seen_healthy or mismatch is None
        self._forget()
        self._tell()

    def _forget(self) -> None:
        """Find out again what follows from the instances when it is asked for."""
        self._healthy.clear()
        for name in _DERIVED:
            self.__dict__.pop(name, None)

    def _tell(self) -> None:
        """Tell listeners about every instance that has changed, whichever report was the cause."""
        for instance in self.instances:
            now = (instance.state, instance.mismatch)
            if instance.told != now:
                instance.told = now
                for listener in self.listeners:
                    listener(instance)


def _twin(instance: Instance, others: Sequence[tuple[Instance, Member]]) -> Instance | None:
    """Return the instance that is the same process under another URL; None if there is none."""
    own = instance.incarnation
    return next((one for one, _ in others if own and one.incarnation == own), None)


def _substitutes(role: Role) -> tuple[Role, ...]:
    """Return the roles of which an instance does what this role does."""
    return _ALTERNATIVES.get(role, (role,))


def _may_return(instance: Instance) -> bool:
    """Return whether it can come back at the same URL, as it does when it is restarted."""
    is_restarted = instance.says_draining and not instance.draining and not instance.is_ending
    return is_restarted or instance.state is InstanceState.UNHEALTHY


def _is_recent(lost_at: float | None, now: float) -> bool:
    return lost_at is not None and now - lost_at < _EXPECTED_SECONDS


def _member(instance: Instance, health: Health) -> Member:
    return Member(instance.role, health, instance.models, instance.reported_at, instance.moved_at)
