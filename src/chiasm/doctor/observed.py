"""What instances, and the proxy in front of them, say about themselves, and what goes wrong when they are asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec
from msgspec.structs import replace

from chiasm.doctor.client import Client, NoAnswerError, NoConnectionError
from chiasm.doctor.report import shown
from chiasm.wire import Costs, Health, ModelList, ProxyHealth, Role

ROLES = frozenset(Role)
_MAX_INSTANCES = 256
_MAX_MODELS = 16
_MAX_CPUS = 4096
_Message = TypeVar("_Message", bound=msgspec.Struct)


@dataclass(frozen=True)
class Observed:
    """One instance, as it answered."""

    url: str
    role: str
    """What it is used as."""
    health: Health = field(default_factory=Health)
    """What it says, fit for a terminal; all defaults if it is in trouble."""
    trouble: str = ""
    """Why it couldn't be asked, or why it isn't healthy; empty if it is."""
    is_unreachable: bool = False
    """Whether no connection could be made from this machine; another machine may reach it."""
    clock_seconds: float | None = None
    """How far its clock is ahead of this machine's."""
    learned: Costs | None = None
    """What work costs it, as the proxy in front of it has learned; None if that isn't known."""

    @property
    def name(self) -> str:
        return f"{self.role or 'instance'} {shown(self.url)}"

    @property
    def engine(self) -> str:
        return self.health.engine or "chiasm"

    @property
    def is_vllm(self) -> bool:
        return self.engine.startswith("vllm")

    @property
    def vllm_version(self) -> str:
        """Empty for another engine, or if it doesn't say."""
        return self.engine.partition(" ")[2] if self.is_vllm else ""


@dataclass(frozen=True)
class ObservedProxy:
    """A proxy, as it answered."""

    url: str
    health: ProxyHealth
    """What it says, fit for a terminal; of its instances, those with a usable URL and role."""
    left_out: int = 0
    """Number of instances beyond those in ``health``, because there are too many to check."""


class _HealthPage(Health, kw_only=True, frozen=True):
    """What an instance answers, or another server: a proxy lists instances."""

    instances: msgspec.Raw = msgspec.Raw()


class _Version(msgspec.Struct):
    version: str = ""


async def ask_proxy(client: Client, url: str) -> ObservedProxy:
    """Raises NoAnswerError, also if something else than a proxy answers."""
    response = await client.get_as_operator(f"{url}/health")
    page = response.read(_HealthPage)
    if not bytes(page.instances):
        if not page.role and page.status in ("ok", "unavailable"):
            raise NoAnswerError(
                "answered, but isn't chiasm's proxy, or tells its operator alone about instances: then give --admin-key-file "
                "or CHIASM_ADMIN_KEY, or run this on its machine if it has no admin key"
            )
        if page.role in ROLES:
            option = "--aggregated-at" if page.role == Role.AGGREGATED else f"--{page.role}"
            raise NoAnswerError(f"is an instance ({page.role}), not a proxy; use `chiasm doctor {option} URL`")
        raise NoAnswerError("answered, but isn't chiasm's proxy: its /health lists no instances")
    said = response.read(ProxyHealth)
    listed = [replace(_fit_for_terminal(one), url=one.url.rstrip("/")) for one in said.instances[:_MAX_INSTANCES]]
    health = replace(
        _fit_for_terminal(said),
        models=[shown(name) for name in said.models[:_MAX_MODELS]],
        instances=[one for one in listed if one.role in ROLES and _is_http(one.url)],
    )
    return ObservedProxy(url, health, max(0, len(said.instances) - _MAX_INSTANCES))


async def ask_instance(client: Client, url: str, role: str) -> Observed:
    """Never raises: what keeps the instance from answering is its ``trouble``."""
    try:
        response = await client.get(f"{url}/health")
        if response.status == 200 and not response.body.strip():
            return await _ask_plain_vllm(client, url, role, response.clock_seconds)
        page = response.read(_HealthPage)
    except NoAnswerError as error:
        return Observed(url, role, trouble=str(error), is_unreachable=isinstance(error, NoConnectionError))
    if bytes(page.instances):
        return Observed(url, role, trouble="is a proxy, not an instance; use `chiasm doctor URL`")
    health = _fit_for_terminal(page)
    if response.status != 200 or health.status != "ok":
        said = ": ".join(part for part in (health.status, health.message) if part)
        return Observed(url, role, trouble=f"is not healthy (HTTP {response.status}): {said}")
    if health.role not in ROLES:
        return Observed(
            url, role, trouble="answered, but isn't an instance that chiasm knows: its /health names no role"
        )
    health = replace(
        health,
        threads=health.threads if health.threads and 0 < health.threads <= _MAX_CPUS else None,
        cpus=sorted(set(health.cpus[:_MAX_CPUS])),
    )
    return Observed(url, role or health.role, health, clock_seconds=response.clock_seconds)


async def _ask_plain_vllm(client: Client, url: str, role: str, clock_seconds: float | None) -> Observed:
    """Ask vLLM without chiasm's middleware: it has an empty /health, a list of models, and a version."""
    try:
        (model, *_) = (await client.get(f"{url}/v1/models")).read(ModelList).data
        if not model.id:
            raise ValueError
    except (NoAnswerError, ValueError):
        raise NoAnswerError(
            "has an empty /health, and /v1/models names no model: it is neither chiasm nor vLLM"
        ) from None
    try:
        version = (await client.get(f"{url}/version")).read(_Version).version
    except NoAnswerError:
        version = ""
    health = Health(model=model.id, engine=f"vllm {version}".strip(), max_model_len=model.max_model_len)
    return Observed(url, role, _fit_for_terminal(health), clock_seconds=clock_seconds)


def _fit_for_terminal(message: _Message) -> _Message:
    texts: dict[str, Any] = {name: getattr(message, name) for name in message.__struct_fields__}
    return replace(message, **{name: shown(text) for name, text in texts.items() if isinstance(text, str)})


def _is_http(url: str) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and len(url) < 2048
