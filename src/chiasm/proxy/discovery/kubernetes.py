"""Instances from EndpointSlices of Kubernetes, listed and then watched.

The watch follows the rules of the API: it goes on where it was, by the resource version of the last event or bookmark; it lists
again when the server has forgotten that version (410); and it connects again, less and less often, while the server is gone.
Whatever goes wrong, the instances stay as they were last known.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import msgspec

from chiasm.errors import ConfigurationError
from chiasm.http.answer import read_beginning
from chiasm.http.listen import base_url
from chiasm.proxy.discovery.base import Source, Tell
from chiasm.proxy.discovery.endpoint_slices import EndpointSlice, Metadata, Reading, instances_of
from chiasm.wire import UNREADABLE

_log = logging.getLogger(__name__)
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where a pod finds its token, the server's certificate authority, and its namespace."""
_PAGE = 250
"""Slices in one answer to a list."""
_MAX_BYTES = 32 << 20
"""Of a page of a list, or of an event."""
_GONE = 410
_FORBIDDEN = (401, 403)


Sleep = Callable[[float], Awaitable[None]]


class GoneError(Exception):
    """The server doesn't know this resource version any more."""


@dataclass(frozen=True)
class Pace:
    """Times of a watch, in seconds."""

    watch_seconds: float = 300.0
    """The server ends a watch after so long."""
    silence_seconds: float = 330.0
    """A watch that says nothing for so long hangs; a server sends a bookmark about once a minute."""
    answer_seconds: float = 30.0
    """For the head of an answer, and for a whole list."""
    first_delay_seconds: float = 0.5
    longest_delay_seconds: float = 15.0


class _Page(msgspec.Struct):
    metadata: Metadata = msgspec.field(default_factory=Metadata)
    items: list[EndpointSlice] | None = None


class _Event(msgspec.Struct):
    type: str = ""
    object: msgspec.Raw = msgspec.Raw(b"{}")


class _Status(msgspec.Struct):
    code: int = 0
    message: str = ""


_page = msgspec.json.Decoder(_Page)
_event = msgspec.json.Decoder(_Event)
_slice = msgspec.json.Decoder(EndpointSlice)
_status = msgspec.json.Decoder(_Status)


class Api:
    """The API server as a pod reaches it. Token and certificate are read again for every call, since they are replaced."""

    def __init__(self, server: str, account: Path = ACCOUNT) -> None:
        self._server = server
        self._account = account

    @classmethod
    def of_pod(cls) -> Api:
        """Return the server of the cluster in which this process runs. Raises ConfigurationError outside of one."""
        host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT")
        if not host or not port:
            raise ConfigurationError(
                "--discover k8s: works in a pod of Kubernetes alone, and KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT "
                "are not set. Use file: or dns: elsewhere."
            )
        return cls(base_url(host, int(port), "https"))

    def namespace(self) -> str:
        """Return the namespace of the pod. Raises ConfigurationError if there is none."""
        try:
            return (self._account / "namespace").read_text().strip()
        except OSError as error:
            raise ConfigurationError(
                f"{self._account / 'namespace'} cannot be read: {error.strerror}. Name the namespace: "
                "k8s:SELECTOR?namespace=NAME."
            ) from None

    def headers(self) -> dict[str, str]:
        """Return the headers of a call. Raises OSError."""
        return {"Authorization": f"Bearer {(self._account / 'token').read_text().strip()}"}

    def ssl(self) -> ssl.SSLContext | bool:
        """Return what checks the server's certificate. Raises OSError."""
        if not self._server.startswith("https:"):
            return True
        return ssl.create_default_context(cafile=str(self._account / "ca.crt"))

    def url(self, namespace: str) -> str:
        """Return where the EndpointSlices of a namespace are."""
        return f"{self._server}/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"


class KubernetesSource(Source):
    """``k8s:SELECTOR``: the endpoints of all services whose labels the selector takes."""

    def __init__(
        self,
        argument: str,
        api: Api,
        selector: str,
        namespace: str,
        reading: Reading,
        pace: Pace = Pace(),
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        """``sleep`` waits so many seconds until the server is asked again."""
        super().__init__(argument)
        self._api = api
        self._url = api.url(namespace)
        self._selector = selector
        self._reading = reading
        self._pace = pace
        self._sleep = sleep
        self._slices: dict[str, EndpointSlice] = {}
        self._version = ""
        """Of the last list, event or bookmark; empty: list first."""
        self._session: aiohttp.ClientSession
        self._failures = 0
        """In a row: the more there are, the later the server is asked next."""
        self._is_away = False
        """Whether the log says that the server can't be watched."""

    async def run(self, tell: Tell) -> None:
        async with aiohttp.ClientSession(trust_env=False) as self._session:
            while True:
                try:
                    if not self._version:
                        await self._list()
                        tell(instances_of(self._slices.values(), self._reading))
                    await self._watch(tell)
                    self._is_away = False
                except GoneError:
                    self._version = ""
                    self._failures += 1  # a server that forgets at once isn't asked at once
                except (aiohttp.ClientError, OSError, *UNREADABLE) as error:
                    if not self._is_away:
                        _log.warning(
                            "%s: the API server can't be watched: %s", self.name, error or type(error).__name__
                        )
                    self._is_away = True
                    self._failures += 1
                await self._sleep(self._delay())

    def _delay(self) -> float:
        if not self._failures:
            return 0.0
        pace = self._pace
        longest: float = min(pace.first_delay_seconds * 2 ** min(self._failures - 1, 16), pace.longest_delay_seconds)
        return float(longest) * random.uniform(0.5, 1.0)  # so that not all proxies come at the same time

    async def _list(self) -> None:
        """Read all slices. Raises GoneError if they change too fast to be read page by page."""
        found: dict[str, EndpointSlice] = {}
        token = ""
        while True:
            asked = {"limit": str(_PAGE)} | ({"continue": token} if token else {})
            async with asyncio.timeout(self._pace.answer_seconds), self._get(asked) as response:
                page = _page.decode(await _read(response))
            found |= {one.metadata.name: one for one in page.items or []}
            token = page.metadata.continue_
            if not token:
                break
        self._slices, self._version = found, page.metadata.resource_version

    async def _watch(self, tell: Tell) -> None:
        """Take events until the server ends the watch. Raises GoneError."""
        asked = {
            "watch": "1",
            "allowWatchBookmarks": "true",
            "resourceVersion": self._version,
            "timeoutSeconds": str(max(1, int(self._pace.watch_seconds))),
        }
        has_heard = False
        async with self._get(asked) as response:
            async for line in _lines(response):
                if self._take(_event.decode(line)):
                    tell(instances_of(self._slices.values(), self._reading))
                self._failures, self._is_away, has_heard = 0, False, True
        if not has_heard:
            self._failures += 1  # a server that ends watches at once isn't asked at once

    def _take(self, event: _Event) -> bool:
        """Apply an event; return whether slices have changed. Raises GoneError, and OSError for another error of the server."""
        if event.type == "ERROR":
            status = _status.decode(event.object)
            if status.code == _GONE:
                raise GoneError
            raise OSError(f"the server says: {status.code} {status.message[:200]}")
        one = _slice.decode(event.object)
        if event.type in ("ADDED", "MODIFIED"):
            self._slices[one.metadata.name] = one
        elif event.type == "DELETED":
            self._slices.pop(one.metadata.name, None)
        self._version = one.metadata.resource_version or self._version
        return event.type != "BOOKMARK"

    @asynccontextmanager
    async def _get(self, asked: dict[str, str]) -> AsyncIterator[aiohttp.ClientResponse]:
        limits = aiohttp.ClientTimeout(
            total=None, connect=self._pace.answer_seconds, sock_read=self._pace.silence_seconds
        )
        async with self._session.get(
            self._url,
            params={"labelSelector": self._selector} | asked,
            headers=self._api.headers(),
            ssl=self._api.ssl(),
            timeout=limits,
            allow_redirects=False,
        ) as response:
            yield response


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """Return the body of an answer. Raises GoneError, and OSError for another status than 200 and for too long a body."""
    _check(response)
    body = await read_beginning(response, _MAX_BYTES + 1)
    if len(body) > _MAX_BYTES:
        raise OSError("an answer of the server is too long")
    return body


async def _lines(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """Yield whole lines; what comes after the last one was cut off, and isn't used."""
    _check(response)
    rest = bytearray()
    async for piece in response.content.iter_any():
        rest += piece
        if len(rest) > _MAX_BYTES:
            raise OSError("an event of the server is too long")
        *lines, last = rest.split(b"\n")
        rest = bytearray(last)
        for line in lines:
            if line.strip():
                yield bytes(line)


def _check(response: aiohttp.ClientResponse) -> None:
    if response.status == _GONE:
        raise GoneError
    if response.status in _FORBIDDEN:
        raise OSError(
            f"the server answers with status {response.status}; bind a role to the service account of the proxy's pod that may "
            "list and watch endpointslices of discovery.k8s.io in this namespace"
        )
    if response.status != 200:
        raise OSError(f"the server answers with status {response.status}")
