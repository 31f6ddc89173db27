"""The settings of a proxy."""

from __future__ import annotations

from dataclasses import dataclass, field

from chiasm.errors import ConfigurationError
from chiasm.http.listen import check_url
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
    """Raises ConfigurationError for settings that cannot work: no instances, roles that don't go together, a URL given twice,
    a limit that isn't positive."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free port."""
    encoders: tuple[str, ...] = ()
    pds: tuple[str, ...] = ()
    aggregated: tuple[str, ...] = ()
    prefills: tuple[str, ...] = ()
    """With ``decodes``, in place of PDs and aggregated instances."""
    decodes: tuple[str, ...] = ()
    admin_key: str | None = None
    """Enables ``/instances`` for requests that send it as a bearer token."""
    deadline_seconds: float = 600.0
    """Longest time from a request's arrival to the last byte of its answer."""
    body_timeout_seconds: float = 60.0
    """Longest time for a client to send its body."""
    connect_timeout_seconds: float = 3.0
    """Longest time for an instance to accept a connection."""
    encode_timeout_seconds: float = 120.0
    """Longest time for one call of one encoder; after it, the images go to another encoder."""
    max_encode_attempts: int = 3
    """Encoder calls per image, on different encoders if possible."""
    max_prefill_attempts: int = 4
    """Prefills per request, including the first: after a prefill instance is lost, and to resume after a decode instance is."""
    max_body_bytes: int = 128 << 20
    max_buffered_bytes: int = 1 << 30
    """Bodies and fetched images of all requests together that are held at one time."""
    max_answer_bytes: int = 64 << 20
    """The longest answer of an instance that isn't a stream."""
    max_concurrent_requests: int = 512
    max_items: int = 32
    """Images per request; a lower limit of an instance also applies."""
    probe_interval_seconds: float = 1.0
    probe_timeout_seconds: float = 5.0
    shutdown_seconds: float = 2.0
    """Time for running requests to finish at shutdown; after it, they are ended with an error."""
    media: MediaConfig = field(default_factory=MediaConfig)

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if getattr(self, name) <= 0:
                raise ConfigurationError(f"{name} must be positive.")
        urls = [check_url(url) for url in (*self.encoders, *self.pds, *self.aggregated, *self.prefills, *self.decodes)]
        if len(set(urls)) != len(urls):
            raise ConfigurationError("An instance's URL is given twice; each instance has one role.")
        whole, parts = (self.pds or self.aggregated), (self.prefills or self.decodes)
        if whole and parts:
            raise ConfigurationError(
                "Prefill and decode instances can't be combined with PD or aggregated instances; "
                "run one proxy for each of the two kinds."
            )
        if self.admin_key is not None:
            return  # missing instances can be added later
        if parts and not (self.prefills and self.decodes):
            missing = "decode" if self.prefills else "prefill"
            raise ConfigurationError(
                f"Prefill and decode instances need each other; give at least one {missing} instance."
            )
        if not whole and not parts:
            raise ConfigurationError(
                "No instance can answer; give at least one PD or aggregated instance, or a prefill and a decode instance."
            )
