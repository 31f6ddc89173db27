"""Looks up the addresses of names. The resolver may fail, take its time, or say that a name has none."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

LOOKUP_SECONDS = 5.0
"""A lookup that takes longer counts as failed; the next one may come while it goes on."""
_NOBODY = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}
"""What the resolver says for a name that has no address: an answer, unlike its other errors."""
Lookup = Callable[[str, int], Awaitable[Sequence[str]]]
AddressInfo = tuple[Any, Any, int, str, Any]
"""As ``getaddrinfo`` says it."""
_running: dict[tuple[asyncio.AbstractEventLoop, str, int], asyncio.Task[list[AddressInfo]]] = {}


async def resolve(name: str, port: int) -> list[AddressInfo]:
    """Return what the resolver says of a name. Raises OSError, and UnicodeError for what can be no name.

    Nothing ends a lookup that no name server answers, and only a few can go on at once. So there is one for all who ask about a
    name, also after they have given up: otherwise one such name would soon keep all others from being looked up.
    """
    loop = asyncio.get_running_loop()
    key = loop, name, port
    running = _running.get(key)
    if running is None:
        running = _running[key] = loop.create_task(loop.getaddrinfo(name, port, type=socket.SOCK_STREAM))
        running.add_done_callback(lambda _: _running.pop(key))
    return await asyncio.shield(running)


async def addresses_of(name: str, port: int) -> list[str]:
    """Return all addresses of a name; none if it has none. Raises OSError if nobody could tell."""
    try:
        found = await resolve(name, port)
    except socket.gaierror as error:
        if error.errno in _NOBODY:
            return []
        raise
    except UnicodeError:
        raise OSError(f"{name!r} is not the name of a host.") from None
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


async def look_up(lookup: Lookup, name: str, port: int) -> Sequence[str]:
    """Return what a lookup finds. Raises OSError if it fails, TimeoutError, which is one, if it takes too long."""
    try:
        async with asyncio.timeout(LOOKUP_SECONDS):
            return await lookup(name, port)
    except TimeoutError:
        raise TimeoutError("There was no answer in time.") from None
