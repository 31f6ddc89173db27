"""Under which URL proxies reach an instance that joins them, and whether they can."""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

from chiasm.errors import ConfigurationError
from chiasm.http.listen import base_url, check_instance_url, check_url, is_address, is_loopback

MAX_PROXIES = 64
_WILDCARDS = ("", "0.0.0.0", "::")
_SOMEWHERE = ("192.0.2.1", 9)
"""An address that is only for documentation."""
_log = logging.getLogger(__name__)


def check_proxies(proxies: Sequence[str], host: str, advertise_url: str) -> tuple[str, ...]:
    """Return the base URLs of the proxies. ``host`` is the address on which the instance listens.

    Raises ConfigurationError for what is no URL, and for an instance that no proxy of another machine can reach.
    """
    if len(proxies) > MAX_PROXIES:
        raise ConfigurationError(f"--join names {len(proxies)} proxies, and {MAX_PROXIES} are the limit.")
    checked = tuple(dict.fromkeys(check_url(url) for url in proxies))
    if advertise_url:
        check_instance_url(advertise_url)
        return checked
    for url in checked:
        if is_loopback(host) and is_address(proxy := urlsplit(url).hostname or "") and not is_loopback(proxy):
            raise ConfigurationError(
                f"--join {url}: an instance that listens on {host} can't be reached from another machine. Give --host its own "
                "address, or --advertise-url the URL under which the proxy reaches it."
            )
    return checked


def own_url(host: str, port: int, proxies: Sequence[str], advertise_url: str, scheme: str = "http") -> str:
    """Return the URL under which proxies reach an instance that listens on this address.

    If it listens on all addresses, that is the one from which it reaches the first proxy.
    """
    if advertise_url:
        return check_instance_url(advertise_url)
    return base_url(_address_towards(proxies[0]) if host in _WILDCARDS else host, port, scheme)


def _address_towards(url: str) -> str:
    """Return the address of this machine from which packets to a URL go. Raises ConfigurationError.

    While the URL's name isn't known, as before the proxy is there, that is the address from which other machines are reached.
    """
    parts = urlsplit(url)
    try:
        family, _, _, _, address = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)[0]
        is_known = True
    except (OSError, UnicodeError):
        family, address, is_known = socket.AF_INET, _SOMEWHERE, False
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing
            own = str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigurationError(
            f"--join {url}: the address of this machine on the way there can't be found ({error}); give --advertise-url the "
            "URL under which the proxy reaches this instance."
        ) from None
    if not is_known:
        _log.warning(
            "The name in --join %s has no address yet, so proxies will be told %s, from which this machine reaches others. If "
            "it isn't that, give --advertise-url the URL under which they reach this instance.",
            url,
            own,
        )
    return own
