"""Makes sources of what a person writes, runs them, and tells the membership what they find."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from chiasm.errors import ChiasmError, ConfigurationError
from chiasm.proxy.discovery.base import Found, Source
from chiasm.proxy.discovery.dns import DnsSource
from chiasm.proxy.discovery.endpoint_slices import Reading
from chiasm.proxy.discovery.file import FileSource
from chiasm.proxy.discovery.kubernetes import Api, KubernetesSource
from chiasm.proxy.membership import Listed, Membership
from chiasm.tasks import end_tasks
from chiasm.wire import Role

_log = logging.getLogger(__name__)
_ASK_SECONDS = 1.0
"""Between two questions to an instance whose role nobody knows."""
_Run = Callable[[], Coroutine[Any, Any, None]]
_FORMS = "file:PATH, dns:NAME:PORT or k8s:SELECTOR"


def parse_source(argument: str) -> Source:
    """Return the source that an argument of ``--discover`` names. Raises ConfigurationError."""
    kind, _, rest = argument.partition(":")
    if kind == "file" and rest:
        return FileSource(argument, Path(rest))
    place, _, query = rest.partition("?")
    if kind == "dns" and place:
        given = _given(argument, query, "role")
        name, _, port = place.rpartition(":")
        if not name or not port.isdecimal() or not 0 < int(port) < 1 << 16:
            raise ConfigurationError(f"{argument!r} names no port; write dns:NAME:PORT.")
        return DnsSource(argument, name, int(port), _role(given.get("role")))
    if kind == "k8s" and place:
        given = _given(argument, query, "role", "namespace", "port")
        api = Api.of_pod()
        namespace = given.get("namespace") or api.namespace()
        return KubernetesSource(
            argument, api, place, namespace, Reading(given.get("port", ""), _role(given.get("role")))
        )
    raise ConfigurationError(f"{argument!r} is nothing to discover instances by; write {_FORMS}.")


def _given(argument: str, query: str, *known: str) -> dict[str, str]:
    given = dict(parse_qsl(query, keep_blank_values=True))
    if unknown := sorted(given.keys() - set(known)):
        raise ConfigurationError(f"{argument!r} has an unknown setting {unknown[0]!r}; there are {', '.join(known)}.")
    return given


def _role(text: str | None) -> Role | None:
    if text is None:
        return None
    try:
        return Role(text)
    except ValueError:
        raise ConfigurationError(f"{text!r} is no role; the roles are {', '.join(Role)}.") from None


class Sources:
    """All sources of one proxy, on its event loop."""

    def __init__(
        self, sources: Sequence[Source], membership: Membership, role_at: Callable[[str], Awaitable[Role]]
    ) -> None:
        """``role_at`` asks an instance for its role. Raises ChiasmError."""
        self._sources = sources
        self._membership = membership
        self._role_at = role_at
        self._found: dict[Source, Sequence[Found]] = {}
        self._roles: dict[str, Role] = {}
        """Of instances whose sources don't know them."""
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        if self._sources:
            runs: list[tuple[str, _Run]] = [("Asking instances for their roles", self._ask)]
            runs += [(one.name, partial(one.run, partial(self._take, one))) for one in self._sources]
            self._tasks = [asyncio.create_task(_keep_running(name, run)) for name, run in runs]

    async def close(self) -> None:
        await end_tasks(*self._tasks)

    def _take(self, source: Source, found: Sequence[Found]) -> None:
        _log.info("%s lists %d instances", source.name, len(found))
        self._found[source] = found
        listed = {one.url for each in self._found.values() for one in each}
        self._roles = {url: role for url, role in self._roles.items() if url in listed}
        self._tell(source)

    def _tell(self, source: Source) -> None:
        found = self._found[source]
        listed = [
            Listed(one.url, role, one.is_ending) for one in found if (role := one.role or self._roles.get(one.url))
        ]
        self._membership.note_list(source.name, listed, keeps=source.keeps)

    async def _ask(self) -> None:
        """Ask instances for their roles, again and again until they have said so, and when they say another one."""
        while True:
            unknown = {
                one.url
                for found in self._found.values()
                for one in found
                if one.role is None and not self._is_known(one.url)
            }
            if unknown:
                await asyncio.gather(*(self._learn(url) for url in unknown))
            await asyncio.sleep(_ASK_SECONDS)

    def _is_known(self, url: str) -> bool:
        """Return whether the role of what is at a URL is known: an address may go to an instance with another one."""
        role = self._roles.get(url)
        return role is not None and self._membership.says_role(url) in (None, role)

    async def _learn(self, url: str) -> None:
        with contextlib.suppress(ChiasmError, TimeoutError):
            async with asyncio.timeout(_ASK_SECONDS):
                self._roles[url] = await self._role_at(url)
            for source, found in self._found.items():
                if any(one.url == url for one in found):
                    self._tell(source)


async def _keep_running(name: str, run: _Run) -> None:
    """Run it, and again after an error that nobody foresaw: without it, the proxy would keep an old list without a word."""
    while True:
        try:
            await run()
        except Exception:
            _log.exception("%s has failed, and is tried again", name)
        await asyncio.sleep(_ASK_SECONDS)
