"""A deployment that runs: each instance is asked what it is, all are compared, and an image is sent on its way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from chiasm.doctor import fleet, storage
from chiasm.doctor.base import Check, Finding, shown
from chiasm.doctor.client import Client, NoAnswerError
from chiasm.doctor.instances import Instance, Proxy, ask_instance, ask_proxy
from chiasm.doctor.travel import Travel, pairs
from chiasm.launch.folders import DEFAULT_MAX_BYTES

DEFAULT_TIMEOUT_SECONDS = 30.0
_PATIENCE = 10
"""Timeouts of one message, that all pairs together are given."""
_TOO_SLOW = "not tried, since those before it have taken too long"

_PROXY = Check("proxy")
_TRAVEL = Check("embedding travels")
_KV = Check("KV travels")
_ELSEWHERE = Check("instances")


@dataclass(frozen=True)
class Folder:
    """Through which instances of this machine are said to exchange embeddings."""

    path: Path
    max_bytes: int = DEFAULT_MAX_BYTES


async def examine_proxy(
    url: str, *, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS, folder: Folder | None = None
) -> AsyncIterator[Finding]:
    """The proxy at base URL ``url``, and the instances behind it."""
    async with Client() as client:
        try:
            proxy = await ask_proxy(client, url)
        except NoAnswerError as error:
            yield _PROXY.problem(
                f"{shown(url)} {error}",
                why="nothing can be found out about what stands behind it.",
                do="check the address, and that `chiasm serve` or `chiasm proxy` runs there.",
                command=f"curl -m 5 {shown(url)}/health",
            )
            return
        for finding in fleet.proxy(proxy):
            yield finding
        found = await _ask(client, [(one.url, one.role) for one in proxy.instances])
        healthy = {one.url for one in proxy.instances if one.state == "healthy"}
        hidden = [one for one in found if one.out_of_reach and one.url in healthy]
        for one in hidden:
            yield _ELSEWHERE.skipped(
                f"{one.name} {one.trouble}; the proxy reaches it, and finds it well: run doctor on the proxy's machine to "
                "have it looked at"
            )
        seen = [one for one in found if one not in hidden]
        async for finding in _examine(client, seen, found, timeout_seconds, folder):
            yield finding
        yield await _through(client, proxy, seen, hidden, timeout_seconds)


async def examine_instances(
    urls: Mapping[str, Sequence[str]],
    *,
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
    folder: Folder | None = None,
) -> AsyncIterator[Finding]:
    """Instances without a proxy: base URLs by role."""
    async with Client() as client:
        found = await _ask(client, [(url, role) for role, several in urls.items() for url in several])
        async for finding in _examine(client, found, found, timeout_seconds, folder):
            yield finding


async def _ask(client: Client, urls: Sequence[tuple[str, str]]) -> list[Instance]:
    return list(await asyncio.gather(*(ask_instance(client, url, role) for url, role in urls)))


async def _examine(
    client: Client,
    found: Sequence[Instance],
    everyone: Sequence[Instance],
    timeout_seconds: float,
    folder: Folder | None,
) -> AsyncIterator[Finding]:
    """``found`` is to be looked at; ``everyone`` are those and others that do their part out of sight."""
    for finding in (*fleet.reachable(found), *fleet.composition(everyone)):
        yield finding
    well = [one for one in found if not one.trouble]
    if not well:
        return
    for check in fleet.CHECKS:
        for finding in check(well):
            yield finding
    if folder is not None:
        for finding in storage.shared_folder(folder.path, {one.ec_store for one in well if one.ec_store}):
            yield finding
        if folder.path.is_dir():
            for finding in storage.room(folder.path, folder.max_bytes, None):
                yield finding
    patience_seconds = _PATIENCE * timeout_seconds
    async for finding in _travel(Travel(client, timeout_seconds), well, patience_seconds):
        yield finding


async def _travel(travel: Travel, well: Sequence[Instance], patience_seconds: float) -> AsyncIterator[Finding]:
    """Each pair, or each reader and each encoder at least once; none begins when ``patience_seconds`` are over."""
    until = time.monotonic() + patience_seconds
    usable = [one for one in well if one.own_role in ("", one.role)]
    of = {role: [one for one in usable if one.role == role] for role in ("encoder", "pd", "prefill", "decode")}
    for encoder, pd in pairs(of["encoder"], of["pd"]):
        if time.monotonic() > until:
            yield _TRAVEL.skipped(f"{encoder.name} to {pd.name}: {_TOO_SLOW}")
            continue
        yield await travel.embedding(encoder, pd)
    for number, (prefill, decode) in enumerate(pairs(of["prefill"], of["decode"])):
        if time.monotonic() > until:
            yield _KV.skipped(f"{prefill.name} to {decode.name}: {_TOO_SLOW}")
            continue
        encoder_of_it = of["encoder"][number % len(of["encoder"])] if of["encoder"] else None
        for finding in await travel.handover(encoder_of_it, prefill, decode):
            yield finding
    if (of["pd"] or of["prefill"]) and not of["encoder"]:
        yield _TRAVEL.skipped("no encoder is well that could send one")
    elif of["encoder"] and not (of["pd"] or (of["prefill"] and of["decode"])):
        yield _TRAVEL.skipped("no instance is well that could read one")
    for one in usable:
        if one.role == "aggregated":
            yield await travel.encodes(one)


async def _through(
    client: Client, proxy: Proxy, seen: Sequence[Instance], hidden: Sequence[Instance], timeout_seconds: float
) -> Finding:
    """Counters prove nothing where an instance is out of sight: what it did may be what is missing."""
    well = [one for one in seen if not one.trouble]
    blind = [Instance(one.url, one.role) for one in hidden]
    return await Travel(client, timeout_seconds).through(proxy, [*well, *blind])
