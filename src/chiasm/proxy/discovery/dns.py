"""Instances behind a name, one for each of its addresses."""

from __future__ import annotations

import asyncio
import logging

from chiasm.http.listen import base_url
from chiasm.http.lookup import Lookup, addresses_of, look_up
from chiasm.proxy.discovery.base import MAX_LISTED, Found, Source, Tell
from chiasm.wire import Role

_log = logging.getLogger(__name__)
INTERVAL_SECONDS = 10.0


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
            except OSError as error:
                _log.warning("%s could not be looked up: %s", self.name, error)
            else:
                if found != before:
                    tell(found)
                before = found
            await asyncio.sleep(INTERVAL_SECONDS)

    async def look(self) -> list[Found]:
        """Return what the name leads to now. Raises OSError."""
        addresses = await look_up(self._lookup, self._host, self._port)
        return [Found(base_url(one, self._port), self._role) for one in sorted(addresses)[:MAX_LISTED]]
