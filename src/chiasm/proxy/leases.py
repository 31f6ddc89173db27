"""Where instances join and renew their leases (``/fleet/lease``), and what keeps time for the membership.

An instance says with a lease that it is here; probes say whether it works. A lease counts for the process that answers at its
URL, which names its incarnation in /health. So neither another process nor one that was replaced can hold it, and no clocks are
compared.

Except for the first one, an instance leaves its call open until the next renewal is due. So the end of the connection shows at
once that the instance is gone, and to the instance that the proxy is.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import msgspec
from msgspec.structs import replace
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, request_response
from starlette.types import Receive

from chiasm.errors import (
    Code,
    ConfigurationError,
    ConflictError,
    ForbiddenError,
    InvalidRequestError,
    OverloadedError,
)
from chiasm.fleet_key import FleetKey
from chiasm.http import json_response, read_body
from chiasm.http.fleet_calls import FleetGuard, caller_of, check_fleet
from chiasm.http.listen import check_instance_url, is_loopback
from chiasm.http.untrusted import read_json
from chiasm.proxy.fleet import Fleet
from chiasm.proxy.instance import Instance
from chiasm.proxy.membership import Membership
from chiasm.proxy.probe import Prober
from chiasm.tasks import end_tasks
from chiasm.wire import DRAINING, LEASE_PATH, RENEW_SECONDS, Lease, LeaseAnswer, Role

LOOK_SECONDS = 0.5
"""Between two looks at the leases."""
MAX_LEASE_BYTES = 16 << 10
_lease = msgspec.json.Decoder(Lease)


class Leases:
    """The leases of one proxy, on its event loop."""

    def __init__(
        self,
        membership: Membership,
        fleet: Fleet,
        prober: Prober,
        key: FleetKey | None,
        clock: Callable[[], float],
    ) -> None:
        """``clock`` returns Unix time, by which leases are signed."""
        self._membership = membership
        self._fleet = fleet
        self._prober = prober
        self._key = key
        self._clock = clock
        self._news: dict[Instance, set[asyncio.Event]] = {}
        """What the open calls of each instance wait for."""
        self._is_stopping = False
        self._looking: asyncio.Task[None] | None = None
        fleet.listeners.append(self._note_change)

    def start(self) -> None:
        """Begin to keep time."""
        self._looking = asyncio.create_task(self._look())

    def stop(self) -> None:
        """Answer all open calls, and refuse further ones: instances go on to other proxies."""
        self._is_stopping = True
        for waiting in self._news.values():
            for event in waiting:
                event.set()

    async def close(self) -> None:
        if self._looking is not None:
            await end_tasks(self._looking)

    async def handle(self, request: Request) -> Response:
        """Take a lease; tell anybody who asks this proxy's clock."""
        if request.method != "POST":
            return json_response(self._terms())
        check_fleet(caller_of(request.scope), "Joining a fleet")
        if self._is_stopping:
            raise OverloadedError("This proxy is shutting down.", code=Code.STOPPING)
        lease = _checked(read_json(_lease, await read_body(request.receive, request.headers, MAX_LEASE_BYTES)))
        if self._key is None and not is_loopback(urlsplit(lease.url).hostname or ""):
            raise ForbiddenError(
                f"A proxy without a fleet key takes instances of its own machine alone, and {lease.url} is not one by its "
                "address. Give the proxy and all instances the same key (--fleet-key-file).",
                code=Code.FLEET_KEY_NEEDED,
            )
        if lease.leaves:
            self._leave(lease)
            return json_response(self._terms())
        instance = await self._take(lease)
        if lease.waits:
            await self._wait_for_news(instance, request.receive)
        return json_response(replace(self._terms(), state=str(instance.state), reason=instance.reason))

    async def _take(self, lease: Lease) -> Instance:
        """Renew a lease, or grant a new one to the process that answers at its URL. Raises ConflictError."""
        known = self._membership.lease_of(lease.url)
        if known is not None and known.incarnation == lease.incarnation:
            instance = self._membership.renew(lease, time.monotonic())
            if lease.status == DRAINING != known.status:
                self._fleet.note_farewell(instance, time.monotonic())
            elif lease.status != known.status:
                await self._prober.check(instance)
            return instance
        before = self._fleet.get(lease.url)
        if before is not None and before.incarnation != lease.incarnation:
            await self._prober.check(before)
            _check_incarnation(before, lease)
        instance = self._membership.renew(lease, time.monotonic())
        await self._prober.check(instance)
        try:
            _check_incarnation(instance, lease)
        except ConflictError:
            self._membership.release(lease.url)
            raise
        return instance

    def _leave(self, lease: Lease) -> None:
        known = self._membership.lease_of(lease.url)
        if known is not None and known.incarnation == lease.incarnation:
            if (instance := self._fleet.get(lease.url)) is not None:
                self._fleet.note_farewell(instance, time.monotonic())
            self._membership.release(lease.url)

    def _terms(self) -> LeaseAnswer:
        names = list(self._key.names) if self._key else []
        return LeaseAnswer(fleet_keys=names, clock_milliseconds=int(self._clock() * 1000))

    # ---- open calls ------------------------------------------------------------------------------------------------------

    async def _wait_for_news(self, instance: Instance, receive: Receive) -> None:
        """Return when the instance's state has changed or the next renewal is due; probe the instance if it is gone."""
        event = asyncio.Event()
        waiting = self._news.setdefault(instance, set())
        waiting.add(event)
        changed, left = asyncio.ensure_future(event.wait()), asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({changed, left}, timeout=RENEW_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if left.done():
                await self._prober.check(instance)
        finally:
            waiting.discard(event)
            if not waiting:
                self._news.pop(instance, None)
            await end_tasks(changed, left)

    def _note_change(self, instance: Instance) -> None:
        for event in self._news.get(instance, ()):
            event.set()

    async def _look(self) -> None:
        while True:
            if not self._is_stopping:  # what still runs goes on, whether leases are renewed or not
                self._membership.look(time.monotonic())
            await asyncio.sleep(LOOK_SECONDS)


def lease_route(leases: Callable[[], Leases], key: FleetKey | None, clock: Callable[[], float]) -> Route:
    """Return the route at which leases are taken; ``leases`` is called when the proxy runs."""

    async def handle(request: Request) -> Response:
        return await leases().handle(request)

    return Route(LEASE_PATH, FleetGuard(request_response(handle), key, clock), methods=["GET", "POST"])


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _checked(lease: Lease) -> Lease:
    """Return the lease with its URL as the proxy writes it. Raises InvalidRequestError."""
    if not lease.incarnation:
        raise InvalidRequestError("A lease needs an incarnation.", param="incarnation")
    with contextlib.suppress(ValueError):
        Role(lease.role)
        try:
            return replace(lease, url=check_instance_url(lease.url))
        except ConfigurationError as error:
            raise InvalidRequestError(error.message, param="url") from None
    raise InvalidRequestError(f"role must be one of {', '.join(Role)}.", param="role")


def _check_incarnation(instance: Instance, lease: Lease) -> None:
    """Raise ConflictError if another process answers at the URL than the one whose lease it is."""
    if instance.incarnation and instance.incarnation != lease.incarnation:
        raise ConflictError(
            f"Another process than the one that asks for a lease answers at {lease.url}; give each instance a URL of its own "
            "(--advertise-url)."
        )
