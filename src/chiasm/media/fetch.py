"""Fetches the bytes behind a URL that a client names.

Clients must not reach the operator's own network through chiasm. So the check is made right before the socket connects, on
the very address that it connects to: a name that resolves differently the second time, a redirect and an unusual notation of
an address cannot get past it. The URL is parsed once per hop, and the parsed URL is what is checked, connected to and sent.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import stat
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from urllib.parse import unquote_to_bytes
from weakref import WeakValueDictionary

import aiohttp
from aiohttp.abc import AbstractResolver
from yarl import URL

from chiasm import __version__
from chiasm.errors import Code, MediaError
from chiasm.media.addresses import AddressGuard, RefusedAddressError
from chiasm.media.config import MediaConfig
from chiasm.media.content_encoding import DECOMPRESSED, CompressionError, ExpandedTooLargeError, decompress
from chiasm.media.data_url import DataURL, decode_data_url, too_large
from chiasm.media.formats import SUPPORTED, format_of, other_kind
from chiasm.media.resolver import MediaResolver
from chiasm.media.url import (
    MAX_URL_CHARACTERS,
    InvalidURLError,
    follow,
    host_of,
    is_data_url,
    parse_http_url,
    scheme_of,
    show,
)

_CHUNK_BYTES = 64 << 10
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MEANINGS = {
    400: "the site does not understand the URL",
    401: "the site wants a login",
    402: "the site wants to be paid",
    403: "the site refuses access; a signed URL may have expired",
    404: "there is nothing under this URL",
    405: "the site refuses access",
    406: "the site has no image to send here",
    408: "the site is too busy",
    410: "what was there has been removed",
    414: "the URL is too long for the site",
    429: "the site refuses more requests for now; try again later",
    451: "the site refuses access for legal reasons",
}
_CERTIFICATE_FAULTS = {
    9: "is not valid yet",
    10: "has expired",
    18: "is signed by itself, not by an authority",
    19: "is signed by an authority that is not trusted here",
    20: "is signed by an authority that is not known here",
    21: "comes without the certificates between it and an authority",
    62: "is for another host",
    64: "is for another address",
}
"""By the number that OpenSSL gives the fault (X509_V_ERR_…)."""


class Fetcher:
    """Fetches ``data:``, ``http(s):`` and ``file:`` URLs within the limits of a MediaConfig.

    A process has one, makes and uses it on one event loop, and closes it at the end.
    """

    def __init__(
        self,
        config: MediaConfig,
        *,
        resolver: AbstractResolver | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        """``ssl_context`` says which authorities are trusted: those of the system, unless it is given."""
        self.config = config
        self._guard = AddressGuard(config.allowed_media_networks)
        self._domains = frozenset(map(host_of, config.allowed_media_domains))
        self._folder = config.allowed_local_media_path and config.allowed_local_media_path.resolve()
        self._turns = asyncio.Semaphore(config.max_concurrent_fetches)
        self._turns_of_hosts: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        # A connector closes no resolver that was given to it.
        self._resolver = resolver or MediaResolver(config.max_concurrent_fetches)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                resolver=self._resolver,
                ssl=ssl_context or True,
                use_dns_cache=False,
                socket_factory=self._guard.open_socket,
                limit=config.max_concurrent_fetches,
                keepalive_timeout=10,
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            timeout=aiohttp.ClientTimeout(
                total=None, connect=config.connect_timeout_seconds, sock_read=config.read_timeout_seconds
            ),
            headers={
                "User-Agent": f"chiasm/{__version__}",
                "Accept": "image/*,*/*;q=0.5",
                "Accept-Encoding": "identity",
            },
        )

    async def close(self) -> None:
        await self._session.close()
        await self._resolver.close()

    async def fetch(self, url: str, hold: Callable[[int], None] = lambda size_bytes: None) -> bytes:
        """Return the bytes behind ``url``. Raises MediaError; its message is meant for the client.

        ``hold`` is told the size of each piece that arrives before it is kept, and may raise to end the fetch.
        """
        if is_data_url(url):
            return self.decode_data_url(url.encode(errors="replace")).data
        if len(url) > MAX_URL_CHARACTERS:
            raise MediaError(
                f"The URL of the image has {len(url):,} characters and {MAX_URL_CHARACTERS:,} is the limit. "
                "Send the image as a data: URL.",
                code=Code.INVALID_URL,
            )
        scheme = scheme_of(url)
        try:
            async with asyncio.timeout(self.config.fetch_timeout_seconds):
                if scheme in {"http", "https"}:
                    return await self._fetch_http(url, hold)
                if scheme == "file":
                    async with self._turns:
                        return await asyncio.to_thread(self._read_file, url.strip())
        except TimeoutError:
            seconds = self.config.fetch_timeout_seconds
            raise MediaError(
                f"The image could not be fetched from its URL within {seconds:g} seconds.", code=Code.MEDIA_TIMEOUT
            ) from None
        named = f"not {scheme[:20]}:" if scheme else "and this one has none of them"
        raise MediaError(
            f"The URL of an image must begin with data:, http: or https:, {named}. Send the image itself as "
            "data:image/png;base64,DATA.",
            code=Code.INVALID_URL,
        )

    def decode_data_url(self, url: bytes) -> DataURL:
        """Return what a ``data:`` URL holds. Takes milliseconds for large ones, so call it in a thread. Raises MediaError."""
        return decode_data_url(url, self.config.max_media_bytes)

    def _turns_of_host(self, host: str) -> asyncio.Semaphore:
        turns = self._turns_of_hosts.get(host)
        if turns is None:
            turns = self._turns_of_hosts[host] = asyncio.Semaphore(self.config.max_fetches_per_host)
        return turns

    async def _fetch_http(self, url: str, hold: Callable[[int], None]) -> bytes:
        try:
            target = parse_http_url(url)
        except InvalidURLError:
            raise MediaError(
                "The URL of the image is not a valid http or https URL; it must have the form https://HOST/PATH.",
                code=Code.INVALID_URL,
            ) from None
        shown = show(target)
        for _ in range(self.config.max_redirects + 1):
            self._check_host(target)
            try:
                # The host's turn comes first, so that who waits for a host takes no other place.
                async with (
                    self._turns_of_host(target.raw_host or ""),
                    self._turns,
                    self._session.get(target, allow_redirects=False) as response,
                ):
                    if response.status not in _REDIRECTS:
                        return await self._read_response(response, shown, hold)
                    target = _redirected(target, response.headers.get("Location"), shown)
            except (aiohttp.ClientError, OSError, ValueError) as error:
                raise _explain(error, shown) from error
        raise MediaError(f"{shown} redirects more than {self.config.max_redirects} times.", code=Code.MEDIA_UNREACHABLE)

    def _check_host(self, target: URL) -> None:
        if self._domains and (target.raw_host or "").rstrip(".") not in self._domains:
            raise MediaError(
                "The URL of the image, or its redirect, names a host that is not allowed here.",
                code=Code.MEDIA_DOMAIN_NOT_ALLOWED,
            )

    async def _read_response(self, response: aiohttp.ClientResponse, shown: str, hold: Callable[[int], None]) -> bytes:
        if response.status != HTTPStatus.OK:
            raise MediaError(
                f"{shown} responded with status {response.status}: {_meaning(response.status)}.",
                code=Code.MEDIA_UNREACHABLE,
            )
        encoding = response.headers.get("Content-Encoding", "").strip().lower() or "identity"
        if encoding != "identity" and encoding not in DECOMPRESSED:
            raise MediaError(
                f"{shown} sent content with the encoding {encoding[:20]!r}, which was not asked for.",
                code=Code.MEDIA_UNREACHABLE,
            )
        self._check_size(response.content_length or 0)
        received = bytearray()
        async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
            hold(len(chunk))
            received += chunk
            self._check_size(len(received))
        data = bytes(received)
        del received
        if encoding != "identity":
            data = await self._decompressed(data, encoding, shown)
        if format_of(data) is None and (kind := other_kind(data)) is not None:
            raise MediaError(
                f"What {shown} sent is {kind}. Give the URL of a file in {SUPPORTED}.", code=Code.INVALID_IMAGE
            )
        return data

    async def _decompressed(self, data: bytes, encoding: str, shown: str) -> bytes:
        try:
            return await asyncio.to_thread(decompress, data, encoding, self.config.max_media_bytes)
        except ExpandedTooLargeError:
            raise too_large(self.config.max_media_bytes) from None
        except CompressionError:
            raise MediaError(
                f"{shown} sent content that is not {encoding}, as it says, or is cut off.", code=Code.MEDIA_UNREACHABLE
            ) from None

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


def _redirected(current: URL, location: str | None, shown: str) -> URL:
    if not location:
        raise MediaError(f"{shown} responded with a redirect that has no Location.", code=Code.MEDIA_UNREACHABLE)
    try:
        return follow(current, location)
    except InvalidURLError:
        raise MediaError(
            f"{shown} redirects to something that is no http or https URL.", code=Code.INVALID_URL
        ) from None


def _meaning(status: int) -> str:
    """Return what a status other than 200 says to somebody who wants an image."""
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return "the site has a fault; try again later"
    if status < HTTPStatus.BAD_REQUEST:
        return "that is no image"
    return _MEANINGS.get(status, "the site refuses the request")


def _explain(error: Exception, shown: str) -> MediaError:
    """Return the error that the client sees. It reveals no addresses, headers or host names behind the URL."""
    if isinstance(error, MediaError):
        return error
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        number = getattr(error.certificate_error, "verify_code", 0)
        return MediaError(
            f"The certificate of {shown}, or of where it redirects to, {_CERTIFICATE_FAULTS.get(number, 'is not valid')}. Send "
            "the image as a data: URL if you trust the site.",
            code=Code.MEDIA_CERTIFICATE_INVALID,
        )
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    if isinstance(cause, RefusedAddressError):
        return MediaError(
            f"{shown} leads to an address that is not public. Images are fetched only from public addresses.",
            code=Code.MEDIA_ADDRESS_NOT_ALLOWED,
        )
    code = Code.MEDIA_UNREACHABLE
    if isinstance(error, TimeoutError):
        code, says = Code.MEDIA_TIMEOUT, f"{shown} did not respond in time"
    elif isinstance(error, aiohttp.ClientConnectorDNSError) or isinstance(cause, socket.gaierror):
        says = f"The host of {shown}, or of where it redirects to, is not known to the name service"
    elif isinstance(cause, ConnectionRefusedError):
        says = f"{shown} refused the connection: nothing listens at its port"
    elif isinstance(cause, ssl.SSLError):
        says = f"{shown} does not speak TLS as https needs it"
    elif isinstance(error, aiohttp.ClientConnectorError):
        says = f"{shown} cannot be reached from here"
    elif isinstance(error, aiohttp.ClientPayloadError):
        says = f"{shown} ended its response before it was complete"
    elif isinstance(error, aiohttp.ClientResponseError):
        says = f"{shown} did not answer in HTTP"
    else:
        says = f"The connection to {shown} was lost"
    return MediaError(f"{says}.", code=code)
