"""What instances, and the proxy before them, say of themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from chiasm.doctor.base import shown
from chiasm.doctor.client import Client, NoAnswerError, NoConnectionError
from chiasm.wire import Role

_MAX_INSTANCES = 256
_MAX_CPUS = 4096
ROLES = tuple(role.value for role in Role)


@dataclass(frozen=True)
class Instance:
    """One instance, as it answered. What it doesn't say is empty or None."""

    url: str
    role: str
    """What it is used as; empty if nobody has said."""
    trouble: str = ""
    """Why it couldn't be asked, or what it says is wrong with it; empty if it is well."""
    out_of_reach: bool = False
    """Whether no connection came about; from elsewhere one may."""
    own_role: str = ""
    model: str = ""
    fingerprint: str = ""
    dtype: str = ""
    ec_store: str = ""
    kv_connector: str = ""
    version: str = ""
    """Of chiasm."""
    engine: str = ""
    """``chiasm``, or ``vllm`` with its version."""
    max_model_len: int | None = None
    device: str = ""
    """``cpu``, ``cuda:0``; of vLLM with all that it may use: ``cuda:0,1``."""
    threads: int | None = None
    """That it computes with on the CPU."""
    cpus: frozenset[int] = frozenset()
    """Those that it may run on."""
    clock_seconds: float | None = None
    """How far its clock is ahead of this machine's."""

    @property
    def name(self) -> str:
        return f"{self.role or 'instance'} {shown(self.url)}"

    @property
    def is_vllm(self) -> bool:
        return self.engine.startswith("vllm")

    @property
    def vllm_version(self) -> str:
        """Empty if it is another engine, or doesn't say."""
        return self.engine.partition(" ")[2] if self.is_vllm else ""

    @property
    def says_what_it_is(self) -> bool:
        """Whether it has a /health as chiasm's instances have: the built-in engine, and vLLM with chiasm's middleware."""
        return bool(self.own_role)


@dataclass(frozen=True)
class Listed:
    """What a proxy says of an instance."""

    url: str
    role: str
    state: str
    reason: str


@dataclass(frozen=True)
class Proxy:
    """The front door, as it answered."""

    url: str
    status: str
    models: tuple[str, ...]
    instances: tuple[Listed, ...]
    left_out: int
    """Instances that are more than are looked at."""
    clock_seconds: float | None


async def ask_proxy(client: Client, url: str) -> Proxy:
    """Raises NoAnswerError, also where something else than a proxy answers."""
    answer = await client.get(f"{url}/health")
    found = answer.json()
    listed = found.get("instances")
    if not isinstance(listed, list):
        if found.get("role") in ROLES:
            role = found["role"]
            option = "--aggregated-at" if role == Role.AGGREGATED else f"--{role}"
            raise NoAnswerError(f"is no proxy but one instance ({role}); ask for it by `chiasm doctor {option} URL`")
        raise NoAnswerError("answered, but is no proxy of chiasm's: its /health lists no instances")
    instances = [_listed(one) for one in listed[:_MAX_INSTANCES] if isinstance(one, dict)]
    models = found.get("models")
    return Proxy(
        url,
        _text(found, "status"),
        tuple(shown(name) for name in models[:16]) if isinstance(models, list) else (),
        tuple(one for one in instances if one.role in ROLES and _is_http(one.url)),
        max(0, len(listed) - _MAX_INSTANCES),
        answer.clock_seconds,
    )


async def ask_instance(client: Client, url: str, role: str) -> Instance:
    """Never raises: what keeps it from answering is its ``trouble``."""
    try:
        answer = await client.get(f"{url}/health")
        if not answer.body.strip() and answer.status == 200:
            return await _ask_plain_vllm(client, url, role, answer.clock_seconds)
        found = answer.json()
        if "instances" in found:
            return Instance(url, role, "is a proxy, not an instance; ask for it by `chiasm doctor URL`")
        status = _text(found, "status")
        if answer.status != 200 or status != "ok":
            said = ": ".join(part for part in (status, _text(found, "message")) if part)
            return Instance(url, role, f"says that it is not well (HTTP {answer.status}): {said or 'nothing more'}")
        if found.get("role") not in ROLES:
            return Instance(url, role, "answered, but is no instance that chiasm knows: its /health names no role")
    except NoAnswerError as error:
        return Instance(url, role, str(error), isinstance(error, NoConnectionError))
    own_role = str(found["role"])
    length = found.get("max_model_len")
    return Instance(
        url,
        role or own_role,
        own_role=own_role,
        model=_text(found, "model"),
        fingerprint=_text(found, "fingerprint"),
        dtype=_text(found, "dtype"),
        ec_store=_text(found, "ec_store"),
        kv_connector=_text(found, "kv_connector"),
        version=_text(found, "version"),
        engine=_text(found, "engine") or "chiasm",
        max_model_len=length if isinstance(length, int) else None,
        device=_text(found, "device"),
        threads=threads if isinstance(threads := found.get("threads"), int) and threads > 0 else None,
        cpus=_numbers(found.get("cpus")),
        clock_seconds=answer.clock_seconds,
    )


async def _ask_plain_vllm(client: Client, url: str, role: str, clock_seconds: float | None) -> Instance:
    """vLLM without chiasm's middleware: an empty /health, a list of models, a version."""
    models = (await client.get(f"{url}/v1/models")).json().get("data")
    first = models[0] if isinstance(models, list) and models and isinstance(models[0], dict) else {}
    if not isinstance(first.get("id"), str):
        raise NoAnswerError("answered an empty /health, and /v1/models names no model: it is neither chiasm nor vLLM")
    try:
        version = _text((await client.get(f"{url}/version")).json(), "version")
    except NoAnswerError:
        version = ""
    length = first.get("max_model_len")
    return Instance(
        url,
        role,
        model=_text(first, "id"),
        engine=f"vllm {version}".strip(),
        max_model_len=length if isinstance(length, int) else None,
        clock_seconds=clock_seconds,
    )


def _listed(one: Mapping[str, Any]) -> Listed:
    url = one.get("url")
    return Listed(
        url.rstrip("/") if isinstance(url, str) and len(url) < 2048 else "",
        _text(one, "role"),
        _text(one, "state"),
        _text(one, "reason"),
    )


def _is_http(url: str) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)


def _numbers(value: object) -> frozenset[int]:
    listed = value[:_MAX_CPUS] if isinstance(value, list) else []
    return frozenset(number for number in listed if isinstance(number, int))


def _text(found: Mapping[str, Any], name: str) -> str:
    value = found.get(name)
    return shown(value) if isinstance(value, str) else ""
