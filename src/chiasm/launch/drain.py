"""Takes an instance down from outside, and notices when it has ended."""

from __future__ import annotations

import asyncio
import errno
import time
from types import TracebackType
from typing import TypeVar

import aiohttp
import msgspec

from chiasm.errors import AuthenticationError, Code, ConfigurationError
from chiasm.fleet_key import FleetKey
from chiasm.http.answer import read_beginning
from chiasm.http.fleet_calls import body_digest, signature
from chiasm.wire import (
    DRAIN_PATH,
    LEASE_PATH,
    UNREADABLE,
    DrainOrder,
    DrainState,
    ErrorBody,
    ErrorDetail,
    Health,
    LeaseAnswer,
)

_LOOK_SECONDS = 0.2
_ANSWER_SECONDS = 15.0
_MAX_BYTES = 1 << 20
_Read = TypeVar("_Read")


class NotDrainedError(ConfigurationError):
    """The instance, or the proxy, can't be asked, or refuses."""


class Drain:
    """The end of one instance, as whoever asks for it sees it."""

    def __init__(
        self, url: str, *, key: FleetKey | None = None, proxy: str | None = None, admin_key: str | None = None
    ) -> None:
        """``key`` signs the order; ``proxy`` is asked in place of the instance, with its admin key if there is one."""
        self.url = url
        self._key = key
        self._proxy = proxy
        self._admin_key = admin_key
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> Drain:
        timeout = aiohttp.ClientTimeout(total=_ANSWER_SECONDS)
        self._session = aiohttp.ClientSession(timeout=timeout, trust_env=False)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._session.close()

    async def begin(self) -> DrainState:
        """Have the instance drain; return what it has left to do. Raises NotDrainedError."""
        place = self._proxy or self.url
        body = msgspec.json.encode(DrainOrder(url=self.url if self._proxy else ""))
        headers = {"Content-Type": "application/json"}
        clock = await self._clock() if self._proxy is not None or self._key is not None else None
        if self._proxy is not None and clock is None:
            raise NotDrainedError(f"{place} is not a proxy, and would drain itself. Name another one with --proxy.")
        if self._admin_key is not None and self._proxy is not None:
            headers["Authorization"] = f"Bearer {self._admin_key}"
        elif self._key is not None:
            headers |= signature(self._key, "POST", DRAIN_PATH, body_digest(body), clock_milliseconds=clock)
        try:
            async with self._session.post(place + DRAIN_PATH, data=body, headers=headers) as response:
                status, content = response.status, await read_beginning(response, _MAX_BYTES)
        except (aiohttp.ClientError, OSError) as error:
            raise NotDrainedError(f"{place} can't be reached: {error or type(error).__name__}.") from None
        try:
            if status != 202:
                if self._proxy is None and await self._is_proxy():
                    raise NotDrainedError(
                        f"{place} is a proxy. Name the instance, and the proxy with --proxy {place} if it is to be asked."
                    )
                said = msgspec.json.decode(content, type=ErrorBody).error
                raise NotDrainedError(f"{place} refuses with status {status}: {self._advice(said) or said.message}")
            return msgspec.json.decode(content, type=DrainState)
        except UNREADABLE:
            raise NotDrainedError(f"{place} answers with status {status}, and not as chiasm does.") from None

    def _advice(self, error: ErrorDetail) -> str:
        """Return what a refusal means for who asks for a drain; empty if its own message says so."""
        if error.code == Code.FLEET_KEY_NEEDED:
            return (
                "It needs the fleet key of the instance. Give it with --fleet-key-file or CHIASM_FLEET_KEY; `chiasm serve` "
                "without either makes one that only it knows."
            )
        if error.type == AuthenticationError.kind and self._proxy is not None:
            return (
                "It needs the admin key of the proxy, or the fleet key. Give one with CHIASM_ADMIN_KEY, --admin-key, "
                "--fleet-key-file or CHIASM_FLEET_KEY; a proxy without an admin key is given one with --admin-key-file."
            )
        return ""

    async def ended(self, state: DrainState, timeout_seconds: float) -> bool:
        """Wait until nothing listens at the URL, or another process answers; return whether that came in time.

        ``state`` is what :meth:`begin` has returned. What can't be reached for another reason may still drain, and so may
        what refuses to answer.
        """
        until = time.monotonic() + timeout_seconds
        while time.monotonic() < until:
            try:
                if (await self._get(f"{self.url}/health", Health)).incarnation not in ("", state.incarnation):
                    return True
            except aiohttp.ClientOSError as error:
                if error.errno == errno.ECONNREFUSED:
                    return True
            except (aiohttp.ClientError, OSError):
                pass
            except UNREADABLE:
                return True
            await asyncio.sleep(_LOOK_SECONDS)
        return False

    async def _is_proxy(self) -> bool:
        """Return whether what refuses to drain is a proxy, which takes leases."""
        try:
            return bool((await self._get(self.url + LEASE_PATH, LeaseAnswer)).clock_milliseconds)
        except (aiohttp.ClientError, OSError, *UNREADABLE):
            return False

    async def _clock(self) -> int | None:
        """Return the time on the clock of the one that is asked, in milliseconds; None if it doesn't say.

        Raises NotDrainedError.
        """
        place = self._proxy or self.url
        try:
            if self._proxy is None:
                return (await self._get(f"{place}/health", Health)).clock_milliseconds
            return (await self._get(place + LEASE_PATH, LeaseAnswer)).clock_milliseconds or None
        except (aiohttp.ClientError, OSError) as error:
            raise NotDrainedError(f"{place} can't be reached: {error or type(error).__name__}.") from None
        except UNREADABLE:
            raise NotDrainedError(f"{place} answers, and not as chiasm does.") from None

    async def _get(self, url: str, kind: type[_Read]) -> _Read:
        """Return what a page says, whatever its status. Raises aiohttp.ClientError, OSError, and what UNREADABLE names."""
        async with self._session.get(url) as response:
            return msgspec.json.decode(await read_beginning(response, _MAX_BYTES), type=kind)
