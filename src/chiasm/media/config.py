"""Which media a process accepts, and where they may come from."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from chiasm.errors import ConfigurationError
from chiasm.media.url import InvalidURLError, host_of
from chiasm.options import Option, check_not_negative, check_positive
from chiasm.ownership import within_reach


@dataclass(frozen=True)
class MediaConfig:
    """The limits for fetching, inspecting and decoding.

    Raises ConfigurationError for a folder that does not exist, a malformed network or host, or a limit that isn't positive.
    """

    max_media_bytes: Annotated[int, Option("Maximum size of an image file.")] = 32 << 20
    """As fetched, or as decoded from base64."""
    max_image_pixels: Annotated[int, Option("Maximum size of an image, height times width.", min=1)] = 64_000_000
    decode_cpu_seconds: Annotated[
        float,
        Option(
            "CPU time for decoding an image whose header doesn't bound it, and half as much more for each 10 million pixels."
        ),
    ] = 2.0
    connect_timeout_seconds: float = 5.0
    """Timeout for name resolution, TCP and TLS of one hop."""
    fetch_timeout_seconds: Annotated[float, Option("Timeout of fetching one URL, redirects included.")] = 30.0
    read_timeout_seconds: float = 5.0
    """A site that sends nothing for so long has ended its response."""
    max_redirects: int = 3
    max_concurrent_fetches: int = 64
    """The limit for all requests together; further fetches wait, within their ``fetch_timeout_seconds``."""
    max_fetches_per_host: int = 16
    """From one host, redirects included, so that a silent one doesn't take all places."""
    max_fetches_per_request: int = 8
    """So that requests take turns."""
    allowed_local_media_path: Annotated[
        Path | None, Option("Folder whose files file:// URLs may name.", unset="file:// URLs are refused")
    ] = None
    allowed_media_domains: Annotated[
        tuple[str, ...],
        Option("Host that URLs may name, and no other; can be repeated.", metavar="HOST", unset="any public host"),
    ] = ()
    """Redirects included."""
    allowed_media_networks: Annotated[
        tuple[str, ...],
        Option("Private network that URLs may lead to, such as 10.0.0.0/8; can be repeated.", metavar="NETWORK"),
    ] = ()

    def __post_init__(self) -> None:
        check_positive(
            self,
            "max_media_bytes",
            "max_image_pixels",
            "decode_cpu_seconds",
            "connect_timeout_seconds",
            "fetch_timeout_seconds",
            "read_timeout_seconds",
            "max_concurrent_fetches",
            "max_fetches_per_host",
            "max_fetches_per_request",
        )
        check_not_negative(self, "max_redirects")
        folder = self.allowed_local_media_path
        if folder is not None and not within_reach(folder).is_dir():
            raise ConfigurationError(f"allowed_local_media_path must name a folder, but {folder} is not one.")
        for network in self.allowed_media_networks:
            try:
                ipaddress.ip_network(network)
            except ValueError as error:
                raise ConfigurationError(
                    f"allowed_media_networks must hold networks such as 10.0.0.0/8: {error}"
                ) from None
        for domain in self.allowed_media_domains:
            try:
                host_of(domain)
            except InvalidURLError:
                raise ConfigurationError(
                    f"allowed_media_domains must hold hosts such as images.example, without scheme and port, not {domain!r}."
                ) from None
