"""One guarded way to the bytes behind a URL.

Where a connection goes is judged at the last moment, on the very address that the socket connects to, so that neither
a name that resolves differently the second time, nor a redirect, nor an unusual notation of an address gets past. The
URL is parsed once per hop, by the library that connects.
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
from chiasm.errors import MediaError
from chiasm.media.addresses import AddressGuard, RefusedAddressError
from chiasm.media.config import MediaConfig
from chiasm.media.data_url import decode_data_url

_CHUNK_BYTES = 64 << 10
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_SHOWN_CHARACTERS = 100


class Fetcher:
    """Gets the bytes of ``data:``, ``http(s):`` and ``file:`` URLs within the limits of a MediaConfig.

    One per process; made and used on one event loop; ``close`` it at the end.
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
        """The bytes behind ``url``. Raises MediaError, with a message for the client, in every other case."""
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
            raise MediaError(f"{_show(url)} did not arrive within {seconds:g} s", code="media_timeout") from None
        raise MediaError("a media URL must begin with data:, http: or https:", code="invalid_url")

    def decode_data_url(self, url: bytes) -> bytes:
        """The bytes that a ``data:`` URL holds. Large ones take milliseconds: use a thread. Raises MediaError."""
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
        raise MediaError(f"{shown} redirects more than {self.config.max_redirects} times", code="media_unreachable")

    def _check_target(self, target: URL) -> None:
        host = (target.host or "").lower().rstrip(".")
        if target.scheme not in {"http", "https"} or not host:
            raise MediaError("a media URL, or where it redirects to, is not http(s)", code="invalid_url")
        if self._domains and host not in self._domains:
            raise MediaError(
                "the media URL, or where it redirects to, is not of an allowed domain", code="media_domain_not_allowed"
            )

    async def _read_response(self, response: aiohttp.ClientResponse, shown: str) -> bytes:
        if response.status != 200:
            raise MediaError(f"{shown} answered with status {response.status}", code="media_unreachable")
        if response.headers.get("Content-Encoding", "identity").lower() not in {"identity", ""}:
            raise MediaError(f"{shown} sent compressed content that nobody asked for", code="media_unreachable")
        self._check_size(response.content_length or 0)
        received = bytearray()
        async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
            received += chunk
            self._check_size(len(received))
        return bytes(received)

    def _check_size(self, size_bytes: int) -> None:
        if size_bytes > self.config.max_media_bytes:
            raise MediaError(f"media is larger than {self.config.max_media_bytes:,} bytes", code="media_too_large")

    def _read_file(self, url: str) -> bytes:
        if self._folder is None:
            raise MediaError("file: URLs are not enabled here", code="media_path_not_allowed")
        authority, slash, rest = url[5:].removeprefix("//").partition("/")
        if authority not in {"", "localhost"} or not slash:
            raise MediaError("a file: URL must look like file:///folder/name.png", code="invalid_url")
        raw = unquote_to_bytes(slash + rest)
        if b"\0" in raw:
            raise MediaError("a file: URL must not hold a NUL", code="invalid_url")
        path = Path(os.fsdecode(raw))
        try:
            path = path.resolve()
        except (OSError, RuntimeError):
            path = Path("/")
        if self._folder not in path.parents:
            raise MediaError("the file: URL is outside of the allowed folder", code="media_path_not_allowed")
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
            with os.fdopen(descriptor, "rb") as file:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode):
                    raise MediaError("the file: URL does not name a regular file", code="media_unreachable")
                self._check_size(status.st_size)
                data = file.read(self.config.max_media_bytes + 1)
        except OSError:
            raise MediaError("the file of the file: URL cannot be read", code="media_unreachable") from None
        self._check_size(len(data))
        return data


def _parse(url: str) -> URL:
    try:
        return URL(url)
    except ValueError:
        raise MediaError("the media URL is not a valid URL", code="invalid_url") from None


def _follow(current: URL, location: str | None, shown: str) -> URL:
    if not location:
        raise MediaError(f"{shown} redirects to nowhere", code="media_unreachable")
    # Credentials of the first host are no business of the next.
    return current.with_user(None).join(URL(location))


def _explain(error: Exception, shown: str) -> MediaError:
    """What the client may know of why a connection failed: nothing of addresses, headers or names behind the URL."""
    if isinstance(error, MediaError):
        return error
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    if isinstance(cause, RefusedAddressError):
        return MediaError(
            f"{shown} leads to an address that is not public; media is fetched from public addresses only",
            code="media_address_not_allowed",
        )
    if isinstance(error, TimeoutError):
        return MediaError(f"{shown} did not answer in time", code="media_timeout")
    if isinstance(error, ValueError):
        return MediaError("the media URL is not a valid URL", code="invalid_url")
    return MediaError(f"{shown} is unreachable or broke off", code="media_unreachable")


def _show(url: str) -> str:
    """The client's URL, short, without credentials and query."""
    head, _, rest = url.partition("://")
    place = rest.split("?", 1)[0].split("#", 1)[0]
    host, slash, path = place.partition("/")
    shown = f"{head}://{host.rpartition('@')[2]}{slash}{path}"
    return shown if len(shown) <= _SHOWN_CHARACTERS else shown[:_SHOWN_CHARACTERS] + "…"
