"""Who belongs to the fleet: what options, an administrator, discovery and leases say, put together.

State only: no clock and no I/O. Sources, leases and administrators feed it; it adds instances to the fleet and removes them.
Instants are seconds on the caller's clock.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

from chiasm.errors import ConflictError
from chiasm.proxy.fleet import Fleet
from chiasm.proxy.instance import Instance
from chiasm.wire import LEASE_SECONDS, AddedInstance, HeldLease, InstanceState, Lease, Members, Role

_log = logging.getLogger(__name__)

OPTIONS = "options"
ADMIN = "admin"
LEASE = "lease"
"""What says that an instance belongs to the fleet; the others are arguments of ``--discover``."""
MAX_INSTANCES = 1024
FORGET_SECONDS = 600.0
"""So long after its last renewal, a lease is forgotten, and with it the instance."""
_LONGEST_LOOK_SECONDS = 1.0
"""From one look at the leases to the next; in a longer time, this process itself stood still."""


class Listed(NamedTuple):
    """One instance as a source lists it."""

    url: str
    role: Role
    is_ending: bool = False
    """Whether it is about to end, so that it gets no new work."""


@dataclass
class _List:
    """What one source says."""

    keeps: bool = False
    """Whether what it lists no more stays until it is unhealthy."""
    listed: dict[str, Listed] = field(default_factory=dict)
    fading: set[str] = field(default_factory=set)
    """URLs that it lists no more."""
    overruled: set[str] = field(default_factory=set)
    """URLs that an administrator has removed; they count again when they were listed no more meanwhile."""


@dataclass
class _Held:
    """One lease."""

    lease: Lease
    renewed_at: float


@dataclass
class _Wanted:
    """One instance that belongs to the fleet."""

    role: Role
    sources: list[str]
    is_ending: bool = False


class Membership:
    """Keeps the instances of a fleet as its sources say.

    An instance is in the fleet while one source lists it. If sources name different roles, that of the first one counts. What
    can't be added is logged, and added when it can be.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._lists: dict[str, _List] = {OPTIONS: _List(), ADMIN: _List()}
        self._leases: dict[str, _Held] = {}
        self._dismissed: dict[str, str] = {}
        """Incarnations that an administrator has removed, by URL."""
        self._refusals: dict[str, str] = {}
        """Why an instance can't be added, by URL, as it was logged."""
        self._looked_at: float | None = None

    # ---- lists -----------------------------------------------------------------------------------------------------------

    def note_list(self, source: str, found: Collection[Listed], *, keeps: bool = False) -> None:
        """Take all that a source lists now; with ``keeps``, what it lists no more stays until it is unhealthy."""
        known = self._lists.setdefault(source, _List())
        known.keeps = keeps
        now = {one.url: one for one in found}
        known.overruled &= now.keys()
        if keeps:
            known.fading = (known.fading | known.listed.keys()) - now.keys()
            now |= {url: known.listed[url] for url in known.fading if url in known.listed}
        known.listed = now
        self.settle()

    def add(self, url: str, role: Role) -> Instance:
        """Add an instance as an administrator says. Raises ConflictError if it is there, or can't be combined with others."""
        known = self._fleet.get(url)
        if known is not None and (known.state is not InstanceState.DRAINING or known.role is not role):
            raise ConflictError(f"{url} is already an instance; its role is {known.role}, its state {known.state}.")
        if refusal := self._refusal(url, role):
            raise ConflictError(refusal)
        self._dismissed.pop(url, None)
        for one in self._lists.values():
            if url in one.listed and one.listed[url].role is role:
                one.overruled.discard(url)
        self._lists[ADMIN].listed[url] = Listed(url, role)
        try:
            return self._settled(url)
        except ConflictError:
            del self._lists[ADMIN].listed[url]
            raise

    def remove(self, url: str) -> Instance | None:
        """Remove an instance as an administrator says, whoever lists it. Return it, or None if there is none."""
        self._lists[ADMIN].listed.pop(url, None)
        for one in self._lists.values():
            one.overruled |= {url} & one.listed.keys()
        if (held := self._leases.pop(url, None)) is not None:
            self._dismissed.pop(url, None)
            self._dismissed[url] = held.lease.incarnation
            while len(self._dismissed) > MAX_INSTANCES:
                del self._dismissed[next(iter(self._dismissed))]
        instance = self._fleet.get(url)
        self.settle()
        return instance

    def says_role(self, url: str) -> Role | None:
        """Return the role that the instance at a URL said last that it has; None if there is none, or it doesn't say."""
        instance = self._fleet.get(url)
        said = instance.health.role if instance is not None and instance.health is not None else ""
        return Role(said) if said in set(Role) else None

    # ---- leases ----------------------------------------------------------------------------------------------------------

    def lease_of(self, url: str) -> Lease | None:
        """Return the lease of the instance at a URL, also if it has lapsed."""
        held = self._leases.get(url)
        return held.lease if held else None

    def renew(self, lease: Lease, now: float) -> Instance:
        """Take a lease whose URL and role were checked, new or renewed.

        Raises ConflictError if the instance can't be in this fleet.
        """
        if self._dismissed.get(lease.url) == lease.incarnation:
            raise ConflictError(
                f"An administrator has removed {lease.url} from this fleet; restart it to have it join again."
            )
        held = self._leases.get(lease.url)
        if held is not None and held.lease.incarnation != lease.incarnation and held.lease.role != lease.role:
            self.release(lease.url)  # its process is gone, since another one answers at the URL
        role = Role(lease.role)
        known = self._fleet.get(lease.url)
        if known is not None and known.role is not role:
            raise ConflictError(f"{lease.url} is an instance of this fleet already; its role is {known.role}.")
        if (known is None or known.draining) and (refusal := self._refusal(lease.url, role)):
            raise ConflictError(refusal)
        self._leases[lease.url] = _Held(lease, now)
        try:
            return self._settled(lease.url)
        except ConflictError:
            del self._leases[lease.url]
            raise

    def release(self, url: str) -> None:
        """Forget a lease: the instance has said that it ends, or another process is at its URL."""
        if self._leases.pop(url, None) is not None:
            self.settle()

    def look(self, now: float) -> None:
        """See which leases have lapsed, and try again what couldn't be done; to be called several times a second."""
        if self._looked_at is not None and (late := now - self._looked_at - _LONGEST_LOOK_SECONDS) > 0:
            for held in self._leases.values():  # what was renewed meanwhile has not been read yet
                held.renewed_at += late
        self._looked_at = now
        for url in [url for url, held in self._leases.items() if now - held.renewed_at > FORGET_SECONDS]:
            del self._leases[url]
        self.settle()

    # ---- another worker of the same proxy --------------------------------------------------------------------------------

    def members(self, now: float) -> Members:
        """Return what no source would tell a membership that is new, or not at once."""
        return Members(
            added=[AddedInstance(url=one.url, role=one.role) for one in self._lists[ADMIN].listed.values()],
            overruled={source: sorted(one.overruled) for source, one in self._lists.items() if one.overruled},
            dismissed=dict(self._dismissed),
            leases=[
                HeldLease(lease=held.lease, age_seconds=max(0.0, now - held.renewed_at))
                for held in self._leases.values()
            ],
        )

    def take_over(self, members: Members, now: float) -> None:
        """Take what another membership of the same fleet knows. For one that is new."""
        for one in members.added:
            self._lists[ADMIN].listed[one.url] = Listed(one.url, Role(one.role))
        for source, urls in members.overruled.items():
            self._lists.setdefault(source, _List()).overruled |= set(urls)
        self._dismissed = dict(members.dismissed)
        for held in members.leases:
            self._leases[held.lease.url] = _Held(held.lease, now - held.age_seconds)
        self.settle()

    # ---- the fleet -------------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Make the fleet what the sources say."""
        wanted = self._wanted()
        for instance in self._fleet.instances:
            one = wanted.get(instance.url)
            if not instance.draining and (one is None or one.role is not instance.role):
                self._fleet.remove(instance)
        for url, one in wanted.items():
            self._keep(url, one)
        for url in self._refusals.keys() - wanted.keys():
            del self._refusals[url]

    def _settled(self, url: str) -> Instance:
        """Return the instance at a URL that was to be added. Raises ConflictError if what other sources list left no way to."""
        self.settle()
        instance = self._fleet.get(url)
        if instance is None:
            raise ConflictError(
                f"{url} is not added, because what another source lists comes first: {self._refusals[url]}"
            )
        return instance

    def _wanted(self) -> dict[str, _Wanted]:
        wanted: dict[str, _Wanted] = {}
        for source, one in self._lists.items():
            for url in [url for url in one.fading if self._is_unhealthy(url)]:
                one.fading.discard(url)
                one.listed.pop(url, None)
            for url, listed in one.listed.items():
                if url not in one.overruled:
                    found = wanted.setdefault(url, _Wanted(listed.role, []))
                    found.sources.append(source)
                    found.is_ending = found.is_ending or listed.is_ending
        for url, held in self._leases.items():
            wanted.setdefault(url, _Wanted(Role(held.lease.role), [])).sources.append(LEASE)
        return wanted

    def _is_unhealthy(self, url: str) -> bool:
        instance = self._fleet.get(url)
        return instance is None or instance.state in {InstanceState.UNHEALTHY, InstanceState.STARTING}

    def _keep(self, url: str, wanted: _Wanted) -> None:
        """Have one instance in the fleet, if that is possible now."""
        instance = self._fleet.get(url)
        if instance is None or (instance.draining and instance.role is wanted.role):
            if refusal := self._refusal(url, wanted.role):
                if self._refusals.get(url) != refusal:
                    _log.warning("%s is not added: %s", url, refusal)
                self._refusals[url] = refusal
                return
            instance = self._fleet.add(url, wanted.role)
        self._refusals.pop(url, None)
        self._fleet.note_listing(instance, tuple(wanted.sources), is_ending=wanted.is_ending)
        held = self._leases.get(url)
        lease = held.lease if held else None
        fault = self._fault(instance, held) if held and wanted.sources == [LEASE] else None
        if (instance.lease, instance.lease_fault) != (lease, fault):
            self._fleet.note_lease(instance, lease, fault)

    def _fault(self, instance: Instance, held: _Held) -> str | None:
        """Return why a lease doesn't count; None if it does."""
        if self._looked_at is not None and self._looked_at - held.renewed_at > LEASE_SECONDS:
            return f"its lease has lapsed: it was not renewed for {LEASE_SECONDS:g} s"
        if instance.incarnation and instance.incarnation != held.lease.incarnation:
            return "another process than the one that joined answers at its URL"
        return None

    def _refusal(self, url: str, role: Role) -> str | None:
        """Return why an instance can't be added; None if it can."""
        if misfit := self._fleet.misfit(role):
            return misfit
        if self._fleet.get(url) is None and len(self._fleet.instances) >= MAX_INSTANCES:
            return f"This fleet has {MAX_INSTANCES} instances, which is the limit."
        return None
