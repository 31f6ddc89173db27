"""How an instance joins proxies (``--join``): it renews a lease with each, and tells them at once what has changed.

Of the answers nothing is believed but what the log says, and the proxy's clock, by which leases are signed: so the clocks of
machines may differ. A name that leads to several addresses stands for as many proxies. No lease ends because a resolver fails,
or leaves out an address.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import msgspec
from msgspec.structs import replace

from chiasm.fleet_key import FleetKey
from chiasm.http.answer import read_beginning
from chiasm.http.fleet_calls import OtherClock, body_digest, signature
from chiasm.http.listen import base_url
from chiasm.http.lookup import Lookup, addresses_of, look_up
from chiasm.http.trust import Trust
from chiasm.server.advertise import MAX_PROXIES
from chiasm.tasks import end_tasks
from chiasm.wire import DRAINING, LEASE_PATH, RENEW_SECONDS, UNREADABLE, ErrorBody, Lease, LeaseAnswer

_log = logging.getLogger(__name__)
_LOOKUP_SECONDS = 10.0
"""Between two lookups of the proxies' names."""
_FIRST_DELAY_SECONDS, _LONGEST_DELAY_SECONDS = 0.1, 0.5
"""Between two attempts to reach a proxy: short, since a proxy that was restarted knows nobody."""
_REFUSED_DELAY_SECONDS = 1.0
_LEAST_SECONDS = 0.05
"""Between two calls, however fast the proxy answers."""
_ANSWER_SECONDS = 15.0
"""Longer than a proxy takes to probe an instance that doesn't answer."""
_TELL_SECONDS = 1.0
"""How long the end of an instance waits for its proxies to know of it."""
_MAX_ANSWER_BYTES = 64 << 10
_answer = msgspec.json.Decoder(LeaseAnswer)
_error = msgspec.json.Decoder(ErrorBody)


class RefusedError(Exception):
    """A proxy has answered that it grants no lease."""


class Joiner:
    """The leases of one instance, on its event loop."""

    def __init__(
        self,
        proxies: Sequence[str],
        key: FleetKey | None,
        describe: Callable[[], Lease],
        *,
        lookup: Lookup | None = None,
    ) -> None:
        """``describe`` returns what the instance says about itself now; ``lookup`` finds the addresses of a name and port."""
        self._proxies = proxies
        self._key = key
        self._describe = describe
        self._lookup = lookup or _proxies_at
        self._lines: dict[tuple[str, str], _Line] = {}
        """By the proxy's URL and its address."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._session: aiohttp.ClientSession

    def start(self) -> None:
        """Begin to join. Called on the event loop of the server."""
        self._loop = asyncio.get_running_loop()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), trust_env=False, cookie_jar=aiohttp.DummyCookieJar()
        )
        self._tasks = [asyncio.create_task(self._follow(url)) for url in dict.fromkeys(self._proxies)]

    async def close(self) -> None:
        """Give all leases back, and end."""
        if not self._tasks:
            return
        await end_tasks(*self._tasks)
        lines = list(self._lines.values())
        await asyncio.gather(*(line.close() for line in lines))  # first, so that none joins again
        await _within(line.leave() for line in lines)
        await self._session.close()

    def change(self) -> None:
        """Tell all proxies what has changed. Any thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._change)

    async def tell(self) -> None:
        """Tell all proxies what has changed; return when those that know the instance know that, or after a second."""
        await _within(line.tell() for line in self._lines.values())

    def _change(self) -> None:
        for line in self._lines.values():
            line.changed.set()

    async def _follow(self, url: str) -> None:
        """Have one line to each address of a proxy's name."""
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        told = ""
        while True:
            problem = ""
            try:
                addresses = await look_up(self._lookup, parts.hostname or "", port)
            except OSError as error:
                problem = str(error)
            else:
                await self._keep(url, port, addresses)
                problem = "" if addresses else "Its name has no address."
            if problem and problem != told:
                _log.warning("The proxy %s is not found: %s", url, problem)
            told = problem
            is_known = any(known == url for known, _ in self._lines)
            await asyncio.sleep(_LOOKUP_SECONDS if is_known else _REFUSED_DELAY_SECONDS)

    async def _keep(self, url: str, port: int, addresses: Sequence[str]) -> None:
        """Have a line to each of these addresses; keep one to another address only while its lease is held."""
        for address in addresses[:MAX_PROXIES]:
            if (url, address) not in self._lines:
                self._lines[url, address] = _Line(url, address, port, self._session, self._key, self._describe)
        for (known, address), line in list(self._lines.items()):
            if known == url and address not in addresses and addresses and not line.is_held:
                del self._lines[known, address]
                await line.close()


class _Line:
    """The lease at one proxy: one call is always open, so that the end of either side is noticed by the other."""

    def __init__(
        self,
        url: str,
        address: str,
        port: int,
        session: aiohttp.ClientSession,
        key: FleetKey | None,
        describe: Callable[[], Lease],
    ) -> None:
        parts = urlsplit(url)
        self._name = url
        self._url = f"{base_url(address, port, parts.scheme)}{LEASE_PATH}"
        self._headers = {"Host": parts.netloc, "Content-Type": "application/json"}
        self._server_hostname = parts.hostname if parts.scheme == "https" else None
        self._trust = Trust()
        self._session = session
        self._key = key
        self._describe = describe
        self._clock = OtherClock()
        """The proxy's."""
        self._told = ""
        self.changed = asyncio.Event()
        self.is_held = False
        """Whether the proxy has granted the lease, as far as is known."""
        self._may_be_held = False
        """Whether it may have granted it: it was asked, and its answer hasn't come."""
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Renew the lease no more."""
        await end_tasks(self._task)

    async def tell(self) -> None:
        """Renew the lease at once, if it is held. Raises nothing."""
        if self.is_held:
            try:
                await self._renew()
            except (RefusedError, aiohttp.ClientError, OSError) as error:
                _log.warning("The proxy %s could not be told: %s", self._name, error)

    async def leave(self) -> None:
        """Give the lease back, if it is or may be held."""
        if self.is_held or self._may_be_held:
            self.is_held = self._may_be_held = False
            await self._call(replace(self._describe(), leaves=True))

    async def _run(self) -> None:
        delay = _FIRST_DELAY_SECONDS
        while True:
            try:
                if self.is_held:
                    await self._hold()
                else:
                    await self._renew()
                delay = _FIRST_DELAY_SECONDS
                await asyncio.sleep(_LEAST_SECONDS)
            except RefusedError as error:
                self._note(False, f"refuses: {error}")
                await asyncio.sleep(_REFUSED_DELAY_SECONDS)
            except (aiohttp.ClientError, OSError) as error:  # a TimeoutError is one
                self._trust.note(error)
                self._note(False, f"can't be reached: {str(error) or type(error).__name__}")
                await asyncio.sleep(delay)
                delay = min(2 * delay, _LONGEST_DELAY_SECONDS)

    async def _hold(self) -> None:
        """Leave a call open until the next renewal is due; renew beside it when something has changed."""
        call = asyncio.ensure_future(self._renew(waits=True))
        try:
            while not call.done():
                changed = asyncio.ensure_future(self.changed.wait())
                await asyncio.wait({call, changed}, return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
                if self.changed.is_set() and not call.done():
                    await self._renew()
            await call
        finally:
            await end_tasks(call)

    async def _renew(self, *, waits: bool = False) -> None:
        self.changed.clear()
        self._may_be_held = True
        lease = replace(self._describe(), waits=waits)
        answer = await self._call(lease)
        is_fault = bool(answer.reason) and lease.status == "ok" and answer.state != DRAINING
        text = f"says {answer.state}: {answer.reason}" if answer.reason else f"says {answer.state}"
        self._note(True, text, logging.WARNING if is_fault else logging.INFO)

    async def _call(self, lease: Lease) -> LeaseAnswer:
        """Send a lease. Raises RefusedError, aiohttp.ClientError or OSError."""
        body = msgspec.json.encode(lease)
        headers = dict(self._headers)
        if self._key is not None:
            if self._clock.milliseconds is None:
                self._clock.set((await self._send("GET", b"", headers)).clock_milliseconds)
            clock = self._clock.milliseconds
            headers |= signature(self._key, "POST", LEASE_PATH, body_digest(body), clock_milliseconds=clock)
        try:
            answer = await self._send("POST", body, headers)
        except RefusedError:
            self._clock.set(None)  # the proxy's clock may have been set
            raise
        self._clock.set(answer.clock_milliseconds)
        return answer

    async def _send(self, method: str, body: bytes, headers: dict[str, str]) -> LeaseAnswer:
        timeout = aiohttp.ClientTimeout(total=RENEW_SECONDS + _ANSWER_SECONDS, sock_connect=RENEW_SECONDS)
        async with self._session.request(
            method,
            self._url,
            data=body,
            headers=headers,
            timeout=timeout,
            allow_redirects=False,
            ssl=True if self._server_hostname is None else self._trust.context,
            server_hostname=self._server_hostname,
        ) as response:
            content = await read_beginning(response, _MAX_ANSWER_BYTES)
            if response.status != 200:
                raise RefusedError(_message(response.status, content))
        try:
            return _answer.decode(content)
        except UNREADABLE as error:
            raise RefusedError(f"its answer is not that of a proxy: {error}") from None

    def _note(self, is_held: bool, text: str, level: int = logging.WARNING) -> None:
        """Note whether the lease is held; log what is new."""
        self.is_held = is_held
        self._may_be_held = False
        if text != self._told:
            self._told = text
            _log.log(level, "The proxy %s (%s) %s", self._name, self._url, text)


async def _within(calls: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Make calls at the same time; those that take longer than _TELL_SECONDS are given up. What fails is not raised."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    if tasks:
        await asyncio.wait(tasks, timeout=_TELL_SECONDS)
        await end_tasks(*tasks)


def _message(status: int, body: bytes) -> str:
    try:
        return _error.decode(body).error.message or f"status {status}"
    except UNREADABLE:
        return f"status {status}; is it a proxy of this version?"


async def _proxies_at(name: str, port: int) -> list[str]:
    addresses = await addresses_of(name, port)
    if name.lower() == "localhost":  # one proxy, by either of its addresses
        addresses.sort(key=lambda address: ":" in address)
        return addresses[:1]
    return addresses
