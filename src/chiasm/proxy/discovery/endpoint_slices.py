"""What EndpointSlices of Kubernetes say about instances. No I/O."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from chiasm.http.listen import base_url
from chiasm.proxy.discovery.base import MAX_LISTED, Found
from chiasm.wire import Role

ROLE_LABEL = "llm-d.ai/role"
_ROLES = {
    "encode": Role.ENCODER,
    "prefill-decode": Role.PD,
    "encode-prefill-decode": Role.AGGREGATED,
    **{str(role): role for role in Role},
}
"""By llm-d's names and by chiasm's."""
_USUAL_PORT = "http"


class Metadata(msgspec.Struct, rename="camel"):
    """Of a slice, or of a list of them."""

    name: str = ""
    resource_version: str = ""
    labels: dict[str, str] | None = None
    continue_: str = msgspec.field(default="", name="continue")


class Conditions(msgspec.Struct):
    """Of an endpoint; what isn't said counts as serving and not terminating."""

    serving: bool | None = None
    terminating: bool | None = None


class TargetRef(msgspec.Struct):
    """The pod that an endpoint stands for."""

    uid: str = ""


class Endpoint(msgspec.Struct, rename="camel"):
    """One pod, at addresses that are equal."""

    addresses: list[str] = []
    conditions: Conditions = msgspec.field(default_factory=Conditions)
    target_ref: TargetRef | None = None


class Port(msgspec.Struct):
    """One port of all endpoints of a slice."""

    name: str | None = None
    port: int | None = None


class EndpointSlice(msgspec.Struct, rename="camel"):
    """A part of a service's endpoints (discovery.k8s.io/v1), as far as it matters here."""

    metadata: Metadata = msgspec.field(default_factory=Metadata)
    address_type: str = "IPv4"
    endpoints: list[Endpoint] | None = None
    ports: list[Port] | None = None


class Reading(NamedTuple):
    """How instances are read from slices."""

    port: str = ""
    """Name or number of the port; empty: the one called ``http``, or else the first."""
    role: Role | None = None
    """None: as the slice's label says, and if it says nothing, as the instance does."""


def instances_of(slices: Iterable[EndpointSlice], reading: Reading) -> list[Found]:
    """Return the instances in all slices, each once: a pod may be in several, also by addresses of two kinds."""
    found: dict[str, tuple[str, Found]] = {}
    for one in sorted(slices, key=lambda one: (one.address_type, one.metadata.name)):  # IPv4 goes before IPv6
        port = _port(one.ports or [], reading.port)
        label = (one.metadata.labels or {}).get(ROLE_LABEL, "")
        role = reading.role or _ROLES.get(label)
        for endpoint in one.endpoints or []:
            is_serving, is_ending = endpoint.conditions.serving is not False, bool(endpoint.conditions.terminating)
            if port is None or not endpoint.addresses or not is_serving:
                continue
            url = base_url(endpoint.addresses[0], port)
            pod = (endpoint.target_ref and endpoint.target_ref.uid) or url
            before = found.get(pod)
            if before is None or (before[1].is_ending and not is_ending and before[0] == one.address_type):
                found[pod] = (one.address_type, Found(url, role, is_ending))
    unique = {one.url: one for _, one in found.values()}
    return sorted(unique.values())[:MAX_LISTED]


def _port(ports: list[Port], wanted: str) -> int | None:
    if wanted.isdecimal():
        return int(wanted)
    known = {one.name or "": one.port for one in ports}
    if wanted:
        return known.get(wanted)
    return known.get(_USUAL_PORT) or next((one.port for one in ports if one.port), None)
