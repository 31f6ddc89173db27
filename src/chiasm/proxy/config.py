"""Everything that a person sets of a proxy."""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import urlsplit

from chiasm.errors import ConfigurationError
from chiasm.media import MediaConfig

_POSITIVE = (
    "deadline_seconds",
    "body_timeout_seconds",
    "connect_timeout_seconds",
    "encode_timeout_seconds",
    "max_encode_attempts",
    "max_prefill_attempts",
    "max_body_bytes",
    "max_buffered_bytes",
    "max_answer_bytes",
    "max_concurrent_requests",
    "max_items",
    "probe_interval_seconds",
    "probe_timeout_seconds",
)


@dataclass(frozen=True)
class ProxyConfig:
    """Raises ConfigurationError for what cannot work: no instances, roles that don't go together, a URL twice, a limit that
    isn't positive."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one."""
    encoders: tuple[str, ...] = ()
    pds: tuple[str, ...] = ()
    aggregated: tuple[str, ...] = ()
    prefills: tuple[str, ...] = ()
    """With ``decodes``, in place of PDs and aggregated instances."""
    decodes: tuple[str, ...] = ()
    admin_key: str | None = None
    """Enables ``/instances`` for whoever sends it as Bearer token."""
    deadline_seconds: float = 600.0
    """From a request's last header to its answer's last byte."""
    body_timeout_seconds: float = 60.0
    """For a client to send its body."""
    connect_timeout_seconds: float = 3.0
    """For an instance to accept a connection."""
    encode_timeout_seconds: float = 120.0
    """For one call of one encoder; then its items go to another."""
    max_encode_attempts: int = 3
    """Calls that one item is given, on different encoders where there are."""
    max_prefill_attempts: int = 4
    """Prefills that one request is given, the first included: for a P that is lost, and to go on when a D is."""
    max_body_bytes: int = 128 << 20
    max_buffered_bytes: int = 1 << 30
    """Bodies and media of all requests together that are held at one time."""
    max_answer_bytes: int = 64 << 20
    """The largest answer of an instance that isn't a stream."""
    max_concurrent_requests: int = 512
    max_items: int = 32
    """Media parts in one request; the fleet's own limit counts if it is lower."""
    probe_interval_seconds: float = 1.0
    probe_timeout_seconds: float = 5.0
    shutdown_seconds: float = 2.0
    """For requests under way to end by themselves when the proxy ends; then they are ended with an error."""
    media: MediaConfig = field(default_factory=MediaConfig)

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if getattr(self, name) <= 0:
                raise ConfigurationError(f"{name} must be positive")
        urls = [check_url(url) for url in (*self.encoders, *self.pds, *self.aggregated, *self.prefills, *self.decodes)]
        if len(set(urls)) != len(urls):
            raise ConfigurationError("an instance's URL is given twice; each instance has one role")
        whole, parts = (self.pds or self.aggregated), (self.prefills or self.decodes)
        if whole and parts:
            raise ConfigurationError(
                "prefill and decode instances stand in place of PDs and aggregated instances, not beside them; "
                "run a proxy for each of the two kinds"
            )
        if self.admin_key is not None:
            return  # what is missing can be added
        if parts and not (self.prefills and self.decodes):
            missing = "decode" if self.prefills else "prefill"
            raise ConfigurationError(
                f"prefill and decode instances need each other; name at least one {missing} instance"
            )
        if not whole and not parts:
            raise ConfigurationError(
                "nothing could answer; name at least one PD or aggregated instance, or a prefill and a decode instance"
            )


def check_url(url: str) -> str:
    """An instance's base URL without a slash at its end. Raises ConfigurationError if it isn't ``http(s)://host[:port]``."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        parts = urlsplit("")
    path = parts.path.rstrip("/")
    if parts.scheme not in {"http", "https"} or not parts.hostname or path or parts.query or parts.fragment:
        raise ConfigurationError(f"{url!r} is not the URL of an instance; it must look like http://host:port")
    return url.rstrip("/")
