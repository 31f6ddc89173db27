"""How one instance serves HTTP."""

from __future__ import annotations

from dataclasses import dataclass, field

from chiasm.errors import ConfigurationError
from chiasm.media import MediaConfig


@dataclass(frozen=True)
class ServerConfig:
    """Address and bounds of one instance's server. Raises ConfigurationError for a bound that is not positive."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one; ``on_ready`` of :func:`chiasm.server.run` tells which."""
    deadline_seconds: float = 600.0
    """The longest that a request may take; ``X-Request-Deadline-Ms`` of a request can only shorten it."""
    max_body_bytes: int = 64 << 20
    """Of one request; more is answered with 413."""
    max_inflight_requests: int = 1024
    """Requests that are read, waited for or answered at one time; one more is answered with 503."""
    max_inflight_body_bytes: int = 1 << 30
    """Bodies of those requests together."""
    max_messages: int = 1024
    """Of one chat."""
    max_prompts: int = 64
    """Of one completion request."""
    media: MediaConfig = field(default_factory=MediaConfig)
    """Of images in requests; a pd instance fetches none."""
    threads: int = 2
    """For tokenizing, decoding and preprocessing, none of which runs on the event loop."""

    def __post_init__(self) -> None:
        for name in (
            "deadline_seconds",
            "max_body_bytes",
            "max_inflight_requests",
            "max_inflight_body_bytes",
            "max_messages",
            "max_prompts",
            "threads",
        ):
            if getattr(self, name) <= 0:
                raise ConfigurationError(f"{name} must be positive.")
