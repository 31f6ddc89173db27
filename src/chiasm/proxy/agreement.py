"""Which instances fit together: those that serve the same model in the same way, through the same connectors and stores.

Pure functions; ``fleet`` calls :func:`agree` whenever an instance has said something or is gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from msgspec.structs import replace

from chiasm.wire import Health, Role

WHOLE_ROLES = (Role.PD, Role.AGGREGATED)
"""Roles that answer a request by themselves."""
PART_ROLES = (Role.PREFILL, Role.DECODE)
"""Roles that answer a request together. A fleet has either these or the others."""
LANGUAGE_ROLES = WHOLE_ROLES + PART_ROLES
PROMPT_ROLES = (*WHOLE_ROLES, Role.PREFILL)
"""They compute prompts."""
FOLDER_CONNECTOR = "SharedStorageConnector"
"""The EC connector of an instance that has a store and doesn't name a connector, as in versions before 0.4."""


class Member(NamedTuple):
    """A reachable instance, for judging it."""

    role: Role
    """The role that it is configured for."""
    health: Health
    models: tuple[str, ...]
    """Names that it serves, ``health.model`` first."""
    reported_at: int = 0
    """Number of its latest report among all that the fleet has received."""
    moved_at: int = 0
    """Number of the report in which it named another store while it was healthy."""


class Agreement(NamedTuple):
    """What the instances that fit together have in common."""

    health: Health
    """Only the fields that :func:`difference` compares count."""
    models: tuple[str, ...]
    is_confirmed: bool = False
    """Whether a language instance shares it; otherwise only encoders do."""


class Verdicts(NamedTuple):
    """The outcome of :func:`agree`."""

    agreement: Agreement | None
    mismatches: list[str | None]
    """Why each member doesn't fit, in order; None if it fits."""


def agree(before: Agreement | None, members: Sequence[Member]) -> Verdicts:
    """Judge every member by what the fleet agreed on before; return what it agrees on now, and who doesn't fit.

    Language instances are judged first, so they decide and encoders follow. A fleet that has agreed on nothing, or no longer
    holds to it, agrees on what the first member says.
    """
    mismatches = [unusable(member.role, member.health) for member in members]
    usable = [index for index, mismatch in enumerate(mismatches) if mismatch is None]
    usable.sort(key=lambda index: members[index].role is Role.ENCODER)
    electorate = [members[index] for index in usable]
    if not electorate:
        return Verdicts(before and before._replace(is_confirmed=False), mismatches)
    agreement = elect(before, electorate)
    for index in usable:
        mismatches[index] = judge(agreement, members[index], electorate)
        if mismatches[index] is None:
            agreement = merge(agreement, members[index])
    return Verdicts(agreement, mismatches)


def unusable(role: Role, health: Health) -> str | None:
    """Return why an instance that says ``health`` can't be used in ``role``, whatever the fleet is; None if it can."""
    if health.role and health.role != role:
        return f"its role is {health.role}, but it is configured as {role}"
    if not health.role and role in PART_ROLES:
        return "it doesn't report its role; prefill and decode need chiasm's own instances, or vLLM's with chiasm's middleware"
    return None


def elect(before: Agreement | None, members: Sequence[Member]) -> Agreement:
    """Return the agreement by which to judge. ``members`` has at least one, in the order in which they decide.

    What was agreed stays as long as one member holds to it. What only encoders have agreed on goes as soon as language
    instances report and none of them shares it.
    """
    language = [member for member in members if member.role in LANGUAGE_ROLES]
    voters = language if language and not (before and before.is_confirmed) else members
    if before is None or all(_difference(before, voter) for voter in voters):
        return Agreement(members[0].health, members[0].models)
    stores = {member.health.ec_store for member in members if member.health.ec_store}
    if stores and before.health.ec_store not in stores:  # it was recreated, and all that use one have moved
        before = before._replace(health=replace(before.health, ec_store=""))
    ec_movers = {mover for member in members if (mover := ec_mover(member.health))}
    # All that move embeddings came back with another connector.
    if ec_movers and ec_mover(before.health) not in ec_movers:
        before = before._replace(health=replace(before.health, ec_connector="", ec_store=""))
    movers = [_kv_mover(member.health) for member in members if member.health.kv_connector]
    if movers and _kv_mover(before.health) not in movers:  # the P and D that agreed on it are gone
        return before._replace(health=replace(before.health, kv_connector=None, engine=""))
    return before


def judge(agreement: Agreement, member: Member, members: Sequence[Member]) -> str | None:
    """Return why ``member`` doesn't fit; None if it does.

    A member that has moved to another store isn't judged by it until all that name the old one have reported again: if the
    store was recreated, they will move too.
    """
    mismatch = _difference(agreement, member)
    if mismatch is None:
        return None
    awaited = any(
        other.health.ec_store == agreement.health.ec_store and other.reported_at < member.moved_at for other in members
    )
    return _difference(agreement, member._replace(health=replace(member.health, ec_store=""))) if awaited else mismatch


def merge(agreement: Agreement, member: Member) -> Agreement:
    """Return the agreement with what ``member``, which fits, says beyond it."""
    known, said = agreement.health, member.health
    return agreement._replace(
        is_confirmed=agreement.is_confirmed or member.role in LANGUAGE_ROLES,
        health=replace(
            known,
            fingerprint=known.fingerprint or said.fingerprint,
            ec_store=known.ec_store or said.ec_store,
            ec_connector=ec_mover(known) or ec_mover(said),
            dtype=known.dtype or said.dtype,
            kv_connector=known.kv_connector or said.kv_connector,
            engine=known.engine if known.kv_connector else said.engine,
        ),
    )


def difference(fleet: Health, instance: Health) -> str | None:
    """Return why ``instance`` can't work together with ``fleet``; None if it can. Unreported values match any."""
    if fleet.model != instance.model:
        return f"it serves {instance.model}, but the fleet serves {fleet.model}"
    if _differ(fleet.fingerprint, instance.fingerprint):
        if _differ(fleet.dtype, instance.dtype):
            return f"its dtype is {instance.dtype}, but the fleet's is {fleet.dtype}"
        # A fingerprint is made of model, processor settings and dtype.
        same_dtype = fleet.dtype and fleet.dtype == instance.dtype
        causes = "model or processor" if same_dtype else "model, processor or dtype"
        return f"its fingerprint ({causes}) differs from the fleet's"
    if _differ(ec_mover(fleet), ec_mover(instance)):
        return f"it moves embeddings with {ec_mover(instance)}, but the fleet with {ec_mover(fleet)}"
    if _differ(fleet.ec_store, instance.ec_store):
        return "it exchanges embeddings through another store than the fleet"
    if fleet.kv_connector and instance.kv_connector and _kv_mover(fleet) != _kv_mover(instance):
        return f"it moves KV with {_kv_mover(instance)}, but the fleet with {_kv_mover(fleet)}"
    return None


def _difference(agreement: Agreement, member: Member) -> str | None:
    """Like :func:`difference`; one served name in common is enough."""
    shares_name = not set(agreement.models).isdisjoint(member.models)
    return difference(
        agreement.health, replace(member.health, model=agreement.health.model) if shares_name else member.health
    )


def _differ(one: str, other: str) -> bool:
    return bool(one and other and one != other)


def ec_mover(health: Health) -> str:
    """Return the name of the EC connector; empty if none is known."""
    return health.ec_connector or (FOLDER_CONNECTOR if health.ec_store else "")


def _kv_mover(health: Health) -> str:
    """Connectors of one name don't understand each other across engines, nor across versions of vLLM."""
    return f"{health.kv_connector} of {health.engine or 'chiasm'}"
