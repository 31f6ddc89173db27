"""What media a process accepts, and from where."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from chiasm.errors import ConfigurationError


@dataclass(frozen=True)
class MediaConfig:
    """Limits of media; one object for fetching, inspecting and decoding.

    Raises ConfigurationError for a folder that isn't there, a network that isn't one, or a limit below 1.
    """

    max_media_bytes: int = 32 << 20
    """The largest file, in bytes as fetched or as decoded from base64."""
    max_image_pixels: int = 64_000_000
    """The largest image, height times width."""
    connect_timeout_seconds: float = 5.0
    """Name resolution, TCP and TLS of one hop."""
    fetch_timeout_seconds: float = 30.0
    """One URL from first to last byte, redirects included."""
    max_redirects: int = 3
    max_concurrent_fetches: int = 64
    """Fetches of all requests together; more wait for their turn within ``fetch_timeout_seconds``."""
    allowed_local_media_path: Path | None = None
    """``file://`` URLs may name files in this folder; without it they are refused."""
    allowed_media_domains: tuple[str, ...] = ()
    """If not empty, http(s) URLs may name these hosts only, redirects included."""
    allowed_media_networks: tuple[str, ...] = ()
    """Networks (``10.0.0.0/8``, ``127.0.0.1/32``, ``fd00::/8``) that media may come from although they aren't public."""

    def __post_init__(self) -> None:
        for name in (
            "max_media_bytes",
            "max_image_pixels",
            "connect_timeout_seconds",
            "fetch_timeout_seconds",
            "max_concurrent_fetches",
        ):
            if getattr(self, name) <= 0:
                raise ConfigurationError(f"{name} must be positive")
        if self.max_redirects < 0:
            raise ConfigurationError("max_redirects must not be negative")
        folder = self.allowed_local_media_path
        if folder is not None and not folder.is_dir():
            raise ConfigurationError(f"allowed_local_media_path: {folder} is not a folder")
        for network in self.allowed_media_networks:
            try:
                ipaddress.ip_network(network)
            except ValueError as error:
                raise ConfigurationError(f"allowed_media_networks: {error}") from None
