"""Looks up the hosts that clients name, in threads of its own: names that nobody answers for delay nothing else.

The event loop's own threads look up instances and do other work; a client that names dead hosts must not keep them busy.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

from aiohttp.abc import AbstractResolver, ResolveResult

_FAILURE_SECONDS = 5.0
"""So long a name that failed is not looked up again."""
_MAX_FAILURES = 1024
_Found = list[ResolveResult]


class MediaResolver(AbstractResolver):
    """Resolves names for a Fetcher. Lookups of one name at the same time share one thread."""

    def __init__(self, threads: int) -> None:
        """At most so many lookups run at the same time."""
        self._threads = ThreadPoolExecutor(threads, "chiasm-resolve")
        self._running: dict[tuple[str, int, int], asyncio.Future[_Found]] = {}
        self._failures: OrderedDict[str, float] = OrderedDict()
        """When each name that failed may be looked up again."""

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC) -> _Found:
        """Return the addresses of a host. Raises OSError."""
        if self._failures.get(host, 0.0) > time.monotonic():
            raise socket.gaierror(socket.EAI_NONAME, "The name was not found a moment ago.")
        key = host, port, int(family)
        running = self._running.get(key)
        if running is None:
            running = asyncio.get_running_loop().run_in_executor(self._threads, _look_up, host, port, family)
            self._running[key] = running
            running.add_done_callback(lambda done: self._note(key, done))
        return await asyncio.shield(running)

    async def close(self) -> None:
        """Forget the lookups that have not begun."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _note(self, key: tuple[str, int, int], done: asyncio.Future[_Found]) -> None:
        del self._running[key]
        if done.cancelled() or done.exception() is None:
            return
        self._failures[key[0]] = time.monotonic() + _FAILURE_SECONDS
        self._failures.move_to_end(key[0])
        while len(self._failures) > _MAX_FAILURES:
            self._failures.popitem(last=False)


def _look_up(host: str, port: int, family: socket.AddressFamily) -> _Found:
    found: _Found = []
    for kind, _, protocol, _, address in socket.getaddrinfo(
        host, port, family, socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG
    ):
        if kind == socket.AF_INET6 and address[3:4] not in ((), (0,)):
            continue  # of one link only, which is never public
        found.append(
            ResolveResult(
                hostname=host,
                host=str(address[0]),
                port=port,
                family=kind,
                proto=protocol,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
        )
    return found
