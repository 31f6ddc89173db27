"""Fetches the bytes behind a URL that a client names.

Clients must not reach the operator's own network through chiasm. So the check is made right before the socket connects, on
the very address that it connects to: a name that resolves differently the second time, a redirect and an unusual notation of
an address cannot get past it. The URL is parsed once per hop, by the library that connects.
"""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path
from urllib.parse import unquote_to_bytes

import aiohttp
from aiohttp.abc import AbstractResolver
from yarl import URL

from chiasm import __version__
from chiasm.errors import Code, MediaError
from chiasm.media.addresses import AddressGuard, RefusedAddressError
from chiasm.media.config import MediaConfig
from chiasm.media.data_url import decode_data_url, too_large

_CHUNK_BYTES = 64 << 10
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_SHOWN_CHARACTERS = 100


class Fetcher:
    """Fetches ``data:``, ``http(s):`` and ``file:`` URLs within the limits of a MediaConfig.

    A process has one, makes and uses it on one event loop, and closes it at the end.
    """

    def __init__(self, config: MediaConfig, *, resolver: AbstractResolver | None = None) -> None:
        self.config = config
        self._guard = AddressGuard(config.allowed_media_networks)
        self._domains = frozenset(domain.lower().rstrip(".") for domain in config.allowed_media_domains)
        self._folder = config.allowed_local_media_path and config.allowed_local_media_path.resolve()
        self._turns = asyncio.Semaphore(config.max_concurrent_fetches)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                resolver=resolver,
                use_dns_cache=False,
                socket_factory=self._guard.open_socket,
                limit=config.max_concurrent_fetches,
                keepalive_timeout=10,
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            timeout=aiohttp.ClientTimeout(total=None, connect=config.connect_timeout_seconds),
            headers={
                "User-Agent": f"chiasm/{__version__}",
                "Accept": "image/*,*/*;q=0.5",
                "Accept-Encoding": "identity",
            },
        )

    async def close(self) -> None:
        await self._session.close()

    async def fetch(self, url: str) -> bytes:
        """Return the bytes behind ``url``. Raises MediaError; its message is meant for the client."""
        scheme = url[:8].partition(":")[0].lower()
        if scheme == "data":
            return self.decode_data_url(url.encode(errors="replace"))
        try:
            async with asyncio.timeout(self.config.fetch_timeout_seconds), self._turns:
                if scheme in {"http", "https"}:
                    return await self._fetch_http(url)
                if scheme == "file":
                    return await asyncio.to_thread(self._read_file, url)
        except TimeoutError:
            seconds = self.config.fetch_timeout_seconds
            raise MediaError(
                f"{_show(url)} could not be fetched within {seconds:g} seconds.", code=Code.MEDIA_TIMEOUT
            ) from None
        raise MediaError("The URL of an image must begin with data:, http: or https:.", code=Code.INVALID_URL)

    def decode_data_url(self, url: bytes) -> bytes:
        """Return the bytes of a ``data:`` URL. Takes milliseconds for large ones, so call it in a thread. Raises MediaError."""
        return decode_data_url(url, self.config.max_media_bytes)

    async def _fetch_http(self, url: str) -> bytes:
        shown = _show(url)
        target = _parse(url)
        for _ in range(self.config.max_redirects + 1):
            self._check_target(target)
            try:
                async with self._session.get(target, allow_redirects=False) as response:
                    if response.status not in _REDIRECTS:
                        return await self._read_response(response, shown)
                    target = _follow(target, response.headers.get("Location"), shown)
            except (aiohttp.ClientError, OSError, ValueError) as error:
                raise _explain(error, shown) from error
        raise MediaError(f"{shown} redirects more than {self.config.max_redirects} times.", code=Code.MEDIA_UNREACHABLE)

    def _check_target(self, target: URL) -> None:
        host = (target.host or "").lower().rstrip(".")
        if target.scheme not in {"http", "https"} or not host:
            raise MediaError(
                "The URL of the image, or its redirect, is not an http or https URL.", code=Code.INVALID_URL
            )
        if self._domains and host not in self._domains:
            raise MediaError(
                "The URL of the image, or its redirect, names a host that is not allowed here.",
                code=Code.MEDIA_DOMAIN_NOT_ALLOWED,
            )

    async def _read_response(self, response: aiohttp.ClientResponse, shown: str) -> bytes:
        if response.status != 200:
            raise MediaError(f"{shown} responded with status {response.status}.", code=Code.MEDIA_UNREACHABLE)
        if response.headers.get("Content-Encoding", "identity").lower() not in {"identity", ""}:
            raise MediaError(
                f"{shown} sent compressed content although none was accepted.", code=Code.MEDIA_UNREACHABLE
            )
        self._check_size(response.content_length or 0)
        received = bytearray()
        async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
            received += chunk
            self._check_size(len(received))
        return bytes(received)

    def _check_size(self, size_bytes: int) -> None:
        if size_bytes > self.config.max_media_bytes:
            raise too_large(self.config.max_media_bytes)

    def _read_file(self, url: str) -> bytes:
        if self._folder is None:
            raise MediaError("file: URLs are not enabled here.", code=Code.MEDIA_PATH_NOT_ALLOWED)
        authority, slash, rest = url[5:].removeprefix("//").partition("/")
        if authority not in {"", "localhost"} or not slash:
            raise MediaError("A file: URL must look like file:///folder/name.png.", code=Code.INVALID_URL)
        raw = unquote_to_bytes(slash + rest)
        if b"\0" in raw:
            raise MediaError("A file: URL must not contain a null byte.", code=Code.INVALID_URL)
        path = Path(os.fsdecode(raw))
        try:
            path = path.resolve()
        except (OSError, RuntimeError):
            path = Path("/")
        if self._folder not in path.parents:
            raise MediaError("The file: URL leads outside the allowed folder.", code=Code.MEDIA_PATH_NOT_ALLOWED)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
            with os.fdopen(descriptor, "rb") as file:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode):
                    raise MediaError("The file: URL does not name a regular file.", code=Code.MEDIA_UNREACHABLE)
                self._check_size(status.st_size)
                data = file.read(self.config.max_media_bytes + 1)
        except OSError:
            raise MediaError("The file that the file: URL names cannot be read.", code=Code.MEDIA_UNREACHABLE) from None
        self._check_size(len(data))
        return data


def _parse(url: str) -> URL:
    try:
        return URL(url)
    except ValueError:
        raise MediaError("The URL of the image is not a valid URL.", code=Code.INVALID_URL) from None


def _follow(current: URL, location: str | None, shown: str) -> URL:
    if not location:
        raise MediaError(f"{shown} responded with a redirect that has no Location.", code=Code.MEDIA_UNREACHABLE)
    # The next host must not see the credentials of this one.
    return current.with_user(None).join(URL(location))


def _explain(error: Exception, shown: str) -> MediaError:
    """Return the error that the client sees. It reveals no addresses, headers or host names behind the URL."""
    if isinstance(error, MediaError):
        return error
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    if isinstance(cause, RefusedAddressError):
        return MediaError(
            f"{shown} leads to an address that is not public. Images are fetched only from public addresses.",
            code=Code.MEDIA_ADDRESS_NOT_ALLOWED,
        )
    if isinstance(error, TimeoutError):
        return MediaError(f"{shown} did not respond in time.", code=Code.MEDIA_TIMEOUT)
    if isinstance(error, ValueError):
        return MediaError("The URL of the image is not a valid URL.", code=Code.INVALID_URL)
    return MediaError(f"The connection to {shown} failed or was lost.", code=Code.MEDIA_UNREACHABLE)


def _show(url: str) -> str:
    """Return the client's URL, shortened and without credentials and query."""
    head, _, rest = url.partition("://")
    place = rest.split("?", 1)[0].split("#", 1)[0]
    host, slash, path = place.partition("/")
    shown = f"{head}://{host.rpartition('@')[2]}{slash}{path}"
    return shown if len(shown) <= _SHOWN_CHARACTERS else shown[:_SHOWN_CHARACTERS] + "…"
