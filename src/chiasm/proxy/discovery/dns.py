"""Instances behind a name, one for each of its addresses."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable

from chiasm.http.listen import base_url
from chiasm.proxy.discovery.base import MAX_LISTED, Found, Source, Tell
from chiasm.wire import Role

_log = logging.getLogger(__name__)
INTERVAL_SECONDS = 10.0
LOOKUP_SECONDS = 5.0
"""A lookup that takes longer counts as failed; the next one may come while it goes on."""
_NOBODY = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}
"""What the resolver says for a name that has no address: an answer, unlike its other errors."""
Lookup = Callable[[str, int], Awaitable[list[str]]]


async def addresses_of(name: str, port: int) -> list[str]:
    """Return all addresses of a name; none if it has none. Raises OSError if nobody could tell."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(name, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno in _NOBODY:
            return []
        raise
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class DnsSource(Source):
    """``dns:NAME:PORT``, such as a headless service of Kubernetes: looked up every ten seconds.

    DNS may forget an address for a while, or answer nothing. So what was there stays as long as it is healthy.
    """

    keeps = True

    def __init__(self, argument: str, name: str, port: int, role: Role | None, lookup: Lookup = addresses_of) -> None:
        super().__init__(argument)
        self._host = name
        self._port = port
        self._role = role
        self._lookup = lookup

    async def run(self, tell: Tell) -> None:
        before: list[Found] | None = None
        while True:
            try:
                found = await self.look()
            except OSError as error:  # a TimeoutError is one
                _log.warning("%s could not be looked up: %s", self.name, error or "no answer in time")
            else:
                if found != before:
                    tell(found)
                before = found
            await asyncio.sleep(INTERVAL_SECONDS)

    async def look(self) -> list[Found]:
        """Return what the name leads to now. Raises OSError."""
        async with asyncio.timeout(LOOKUP_SECONDS):
            addresses = await self._lookup(self._host, self._port)
        return [Found(base_url(one, self._port), self._role) for one in sorted(addresses)[:MAX_LISTED]]
