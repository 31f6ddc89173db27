"""Whether instances will accept a client's API key, asked before anything is done for it, such as fetching images.

A proxy that has the keys itself refuses at its front door. This is for one that doesn't: the keys are the instances' own, which
say in /health that they need one, and a language instance is asked for its models with the client's key.
"""

from __future__ import annotations

import time
from collections import OrderedDict

from starlette.datastructures import Headers

from chiasm.http.keys import bearer, digest_of, wrong_key
from chiasm.proxy.agreement import LANGUAGE_ROLES
from chiasm.proxy.fleet import Fleet
from chiasm.proxy.upstream import Upstream, UpstreamError

_REMEMBERED = 1024
_REMEMBERED_SECONDS = 60.0
_TIMEOUT_SECONDS = 2.0
_MAX_RESPONSE_BYTES = 1 << 20
_REFUSALS = (401, 403)


class KeyCheck:
    """The keys that instances have accepted lately, by their digests. Made and used on one event loop."""

    def __init__(self, fleet: Fleet, upstream: Upstream) -> None:
        self._fleet = fleet
        self._upstream = upstream
        self._accepted_at: OrderedDict[bytes, float] = OrderedDict()
        """On the clock of ``time.monotonic``."""

    async def check(self, headers: Headers) -> None:
        """Raise AuthenticationError if an instance that needs a key refuses the one in these headers."""
        instances = self._fleet.healthy(*LANGUAGE_ROLES)
        asked = next((one for one in instances if one.health is not None and one.health.needs_key), None)
        if asked is None:
            return
        key = bearer(headers)
        digest, now = digest_of(key), time.monotonic()
        if now - self._accepted_at.get(digest, -_REMEMBERED_SECONDS) < _REMEMBERED_SECONDS:
            return
        try:
            response = await self._upstream.get(
                f"{asked.url}/v1/models",
                timeout_seconds=_TIMEOUT_SECONDS,
                max_bytes=_MAX_RESPONSE_BYTES,
                headers={"Authorization": headers.get("authorization", "")},
            )
        except UpstreamError:
            return  # whoever gets the request will check its key
        if response.status in _REFUSALS:
            raise wrong_key(key)
        if response.status == 200:
            self._accepted_at[digest] = now
            self._accepted_at.move_to_end(digest)
            if len(self._accepted_at) > _REMEMBERED:
                self._accepted_at.popitem(last=False)
