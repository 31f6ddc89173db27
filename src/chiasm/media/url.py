"""Parses the http URLs that clients and redirects name, and keeps what they say byte for byte.

A signed URL is valid only as it was signed, so no percent-encoding is undone or added where the URL is well formed. What may
not stand in a URL (controls, spaces, characters beyond ASCII) is percent-encoded as browsers do. The host is what the URL says
after IDNA, and nothing else in the URL can be mistaken for it: the parsed URL is both what is checked and what is connected to.
"""

from __future__ import annotations

import re
from ipaddress import IPv6Address
from typing import NamedTuple
from urllib.parse import quote, urljoin

from yarl import URL

MAX_URL_CHARACTERS = 32 << 10
_SHOWN_CHARACTERS = 100
_AROUND = "".join(map(chr, range(0x21)))
_DATA = re.compile(r"[\0-\x20]*data:", re.IGNORECASE)
_DATA_BYTES = re.compile(rb"[\0-\x20]*data:", re.IGNORECASE)
_DROPPED = {ord(character): None for character in "\t\r\n"}
_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*):")
_HTTP = re.compile(r"(https?)://([^/?#]*)([^?#]*)(?:\?([^#]*))?", re.IGNORECASE)
_PORT = re.compile(r"[0-9]{1,5}")
_KEPT_IN_QUERY = "!#$%&'()*+,-./:;=?@[\\]^_`{|}~"
_KEPT_IN_PATH = "!$%&'()*+,-./:;=@[]_|~"
_KEPT_IN_USER = "!$%&'()*+,-.;=_~"
_MAX_HOST_CHARACTERS = 253
_ORIGIN = "http://a"
"""Stands for any in the resolution of relative paths."""


class InvalidURLError(ValueError):
    """The URL is malformed, or not an http URL."""


class _Authority(NamedTuple):
    user: str | None
    password: str | None
    host: str
    """In ASCII: a name, IPv4 in any notation, or IPv6 in brackets."""
    port: int | None


def is_data_url(url: str | bytes) -> bool:
    """Whether this is a ``data:`` URL, perhaps with white space before it."""
    return (_DATA.match(url) if isinstance(url, str) else _DATA_BYTES.match(url)) is not None


def scheme_of(url: str) -> str:
    """Return the scheme in lower case, or an empty string if there is none."""
    match = _SCHEME.match(url.lstrip(_AROUND))
    return match[1].lower() if match else ""


def parse_http_url(url: str) -> URL:
    """Return an http or https URL that a client sent, without its fragment. Raises InvalidURLError."""
    match = _HTTP.match(_cleaned(url))
    if match is None:
        raise InvalidURLError
    scheme, authority, path, query = match.groups()
    user, password, host, port = _authority(authority)
    return URL.build(
        scheme=scheme.lower(),
        user=user,
        password=password,
        host=host,
        port=port,
        path=_quoted(path, _KEPT_IN_PATH) or "/",
        query_string=_quoted(query or "", _KEPT_IN_QUERY),
        encoded=True,
    )


def follow(current: URL, location: str) -> URL:
    """Return where a redirect from ``current`` leads; credentials of ``current`` are not passed on. Raises InvalidURLError."""
    location = _cleaned(location)
    if _SCHEME.match(location):
        return parse_http_url(location)
    if location.startswith("//"):
        return parse_http_url(f"{current.scheme}:{location}")
    origin = f"{current.scheme}://{current.host_subcomponent}:{current.port}"
    if not location.startswith("/"):
        path, mark, query = location.partition("#")[0].partition("?")
        if path:
            path = urljoin(_ORIGIN + current.raw_path, "./" + path).removeprefix(_ORIGIN)
        location = f"{path or current.raw_path}{mark}{query}"
    return parse_http_url(origin + location)


def host_of(text: str) -> str:
    """Return what ``raw_host`` of a parsed URL is for this name or address, without a dot at its end.

    Raises InvalidURLError.
    """
    try:
        return str(IPv6Address(text.removeprefix("[").removesuffix("]")))
    except ValueError:
        return _host(text).rstrip(".")


def show(url: URL) -> str:
    """Return the URL as messages show it: shortened, without credentials and query."""
    shown = str(url.with_user(None).with_query(None)) if url.raw_user or url.raw_query_string else str(url)
    return shown if len(shown) <= _SHOWN_CHARACTERS else shown[:_SHOWN_CHARACTERS] + "…"


def _cleaned(url: str) -> str:
    """Return the URL without what browsers drop: controls and spaces around it, tabs and ends of lines within."""
    url = url.strip(_AROUND)
    if len(url) > MAX_URL_CHARACTERS:
        raise InvalidURLError
    return url.translate(_DROPPED)


def _authority(text: str) -> _Authority:
    """Split what is between // and the path. Raises InvalidURLError."""
    if "\\" in text:  # browsers take it for a slash, others for a character of the user's name
        raise InvalidURLError
    credentials, at, place = text.rpartition("@")
    name, colon, secret = credentials.partition(":")
    user = _quoted(name, _KEPT_IN_USER) if at else None
    password = _quoted(secret, _KEPT_IN_USER) if colon else None
    if place.startswith("["):
        inside, bracket, rest = place[1:].partition("]")
        if not bracket or rest[:1] not in ("", ":"):
            raise InvalidURLError
        try:
            host, port = f"[{IPv6Address(inside)}]", rest[1:]
        except ValueError:
            raise InvalidURLError from None
        if "%" in host:  # a zone
            raise InvalidURLError
    else:
        name, _, port = place.partition(":")
        host = _host(name)
    if port and not (_PORT.fullmatch(port) and 1 <= int(port) <= 65535):
        raise InvalidURLError
    return _Authority(user, password, host, int(port) if port else None)


def _host(text: str) -> str:
    """Return a host in ASCII. Raises InvalidURLError for what no host can be called."""
    if not text or "%" in text or ":" in text:
        raise InvalidURLError
    try:
        host = URL.build(scheme="http", host=text).raw_host or ""
    except ValueError:
        raise InvalidURLError from None
    if not host.isascii() or len(host) > _MAX_HOST_CHARACTERS or not all(host.removesuffix(".").split(".")):
        raise InvalidURLError
    return host


def _quoted(text: str, kept: str) -> str:
    """Return ``text`` with every character percent-encoded that is neither alphanumeric nor in ``kept``."""
    return quote(text.encode(errors="surrogateescape"), safe=kept)
