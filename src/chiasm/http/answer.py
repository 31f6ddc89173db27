"""Reads what another server answers."""

from __future__ import annotations

import aiohttp


async def read_beginning(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    """Return the body, or its first ``max_bytes``. It may arrive in several pieces. Raises aiohttp.ClientError, OSError."""
    body = bytearray()
    while more := await response.content.read(max_bytes - len(body)):
        body += more
    return bytes(body)
