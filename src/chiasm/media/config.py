"""Which media a process accepts, and where they may come from."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from chiasm.errors import ConfigurationError


@dataclass(frozen=True)
class MediaConfig:
    """The limits for fetching, inspecting and decoding.

    Raises ConfigurationError for a folder that does not exist, a malformed network, or a limit that isn't positive.
    """

    max_media_bytes: int = 32 << 20
    """The largest image file, as fetched or as decoded from base64."""
    max_image_pixels: int = 64_000_000
    """The largest image: height times width."""
    connect_timeout_seconds: float = 5.0
    """Timeout for name resolution, TCP and TLS of one hop."""
    fetch_timeout_seconds: float = 30.0
    """Timeout for one URL, from the first to the last byte, including redirects."""
    max_redirects: int = 3
    max_concurrent_fetches: int = 64
    """The limit for all requests together; further fetches wait, within their ``fetch_timeout_seconds``."""
    allowed_local_media_path: Path | None = None
    """The folder whose files ``file://`` URLs may name; None refuses all such URLs."""
    allowed_media_domains: tuple[str, ...] = ()
    """If not empty, the only hosts that http(s) URLs and redirects may name."""
    allowed_media_networks: tuple[str, ...] = ()
    """Networks such as ``10.0.0.0/8`` that media may be fetched from although they are not public."""

    def __post_init__(self) -> None:
        for name in (
            "max_media_bytes",
            "max_image_pixels",
            "connect_timeout_seconds",
            "fetch_timeout_seconds",
            "max_concurrent_fetches",
        ):
            if getattr(self, name) <= 0:
                raise ConfigurationError(f"{name} must be positive.")
        if self.max_redirects < 0:
            raise ConfigurationError("max_redirects must not be negative.")
        folder = self.allowed_local_media_path
        if folder is not None and not folder.is_dir():
            raise ConfigurationError(f"allowed_local_media_path must name a folder, but {folder} is not one.")
        for network in self.allowed_media_networks:
            try:
                ipaddress.ip_network(network)
            except ValueError as error:
                raise ConfigurationError(
                    f"allowed_media_networks must hold networks such as 10.0.0.0/8: {error}"
                ) from None
