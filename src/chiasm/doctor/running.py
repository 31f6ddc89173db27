"""Checks of a running deployment: each instance is asked how it is, all are compared, and images are sent through them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from msgspec import UNSET

from chiasm.doctor import fleet, storage, store
from chiasm.doctor.client import Client, Limits, NoAnswerError
from chiasm.doctor.costs import costs
from chiasm.doctor.end_to_end import check_instances, check_proxy
from chiasm.doctor.observed import Observed, ask_instance, ask_proxy
from chiasm.doctor.report import Result, shown
from chiasm.fleet_key import FleetKey
from chiasm.launch.folders import DEFAULT_MAX_BYTES
from chiasm.wire import InstanceState, Role


@dataclass(frozen=True)
class Folder:
    """The folder through which instances are said to exchange embeddings, as this machine sees it."""

    path: Path
    max_bytes: int = DEFAULT_MAX_BYTES


async def examine_proxy(
    url: str,
    *,
    limits: Limits,
    folder: Folder | None = None,
    store_url: str = "",
    key: str | None = None,
    fleet_key: FleetKey | None = None,
    admin_key: str | None = None,
) -> AsyncIterator[Result]:
    """Check the proxy at base URL ``url``, and the instances behind it; the keys are those of all of them."""
    async with Client(limits, key, fleet_key, admin_key) as client:
        try:
            proxy = await ask_proxy(client, url)
        except NoAnswerError as error:
            yield fleet.PROXY.problem(
                f"{shown(url)} {error}",
                why="the instances behind it can't be checked.",
                do="check the address, and that `chiasm serve` or `chiasm proxy` runs there.",
                command=f"curl -m 5 {shown(url)}/health",
            )
            return
        for result in fleet.proxy(proxy):
            yield result
        instances = await _ask(client, [(one.url, one.role) for one in proxy.health.instances])
        learned = {one.url: one.costs for one in proxy.health.instances if one.costs is not UNSET}
        instances = [replace(one, learned=learned.get(one.url)) for one in instances]
        healthy = {one.url for one in proxy.health.instances if one.state == InstanceState.HEALTHY}
        hidden = [one for one in instances if one.is_unreachable and one.url in healthy]
        for one in hidden:
            yield fleet.INSTANCES.skipped(
                f"{one.name} {one.trouble}, but the proxy reaches it and it is healthy; run doctor on the proxy's machine to "
                "check it"
            )
        reached = [one for one in instances if one not in hidden]
        async for result in _examine(client, reached, instances, folder, store_url):
            yield result
        # The counters of hidden instances are unknown, so they prove nothing.
        yield await check_proxy(client, proxy, [one for one in instances if not one.trouble or one in hidden])


async def examine_instances(
    urls: Mapping[str, Sequence[str]],
    *,
    limits: Limits,
    folder: Folder | None = None,
    store_url: str = "",
    key: str | None = None,
    fleet_key: FleetKey | None = None,
) -> AsyncIterator[Result]:
    """Check instances without a proxy, given as base URLs by role."""
    async with Client(limits, key, fleet_key) as client:
        instances = await _ask(client, [(url, role) for role, several in urls.items() for url in several])
        async for result in _examine(client, instances, instances, folder, store_url):
            yield result


async def _ask(client: Client, urls: Sequence[tuple[str, str]]) -> list[Observed]:
    return list(await asyncio.gather(*(ask_instance(client, url, role) for url, role in urls)))


async def _examine(
    client: Client, reached: Sequence[Observed], everyone: Sequence[Observed], folder: Folder | None, store_url: str
) -> AsyncIterator[Result]:
    """Check ``reached``; ``everyone`` includes instances that can't be reached from here, but do their part."""
    healthy = [one for one in reached if not one.trouble]
    results = [
        fleet.health(reached),
        fleet.composition(everyone),
        *(check(healthy) for check in (*fleet.CHECKS, costs) if healthy),
    ]
    if folder is not None and healthy:
        results.append(_check_folder(folder, healthy))
    if store_url:
        results.append(store.store(store_url))
    for result in chain(*results):
        yield result
    for result in fleet.keys(healthy, client.fleet_key):
        yield result
    if not fleet.accept(healthy, client.fleet_key):
        healthy = [one for one in healthy if one.role == Role.AGGREGATED]  # they are sent what anybody may send
    async for result in check_instances(client, healthy):
        yield result


def _check_folder(folder: Folder, instances: Sequence[Observed]) -> Iterator[Result]:
    yield from storage.shared_folder(folder.path, {one.health.ec_store for one in instances} - {""})
    if os.path.isdir(folder.path):
        yield from storage.room(folder.path, folder.max_bytes, None)
