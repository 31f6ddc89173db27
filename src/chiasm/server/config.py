"""The configuration of an instance's server."""

from __future__ import annotations

from dataclasses import dataclass, field

from chiasm.errors import ConfigurationError
from chiasm.media import MediaConfig


@dataclass(frozen=True)
class ServerConfig:
    """Address and bounds of an instance's server. Raises ConfigurationError for a bound that is not positive."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free port, which ``on_ready`` of :func:`chiasm.server.run` reports."""
    deadline_seconds: float = 600.0
    """The longest that a request may take; its ``X-Request-Deadline-Ms`` can only shorten this."""
    body_timeout_seconds: float = 60.0
    """In which the body of a request must arrive; a slower one is answered with 408."""
    max_body_bytes: int = 64 << 20
    """Size of one request's body; a larger one is answered with 413."""
    max_inflight_requests: int = 1024
    """Requests at one time; one more is answered with 503."""
    max_inflight_body_bytes: int = 1 << 30
    """Bodies that all requests together hold; one more is answered with 503."""
    max_messages: int = 1024
    """Messages of one chat."""
    max_prompts: int = 64
    """Prompts of one text completion."""
    media: MediaConfig = field(default_factory=MediaConfig)
    """Limits of images; only encoder and aggregated instances fetch them."""
    threads: int = 2
    """Threads that tokenize, decode and preprocess, which would block the event loop."""

    def __post_init__(self) -> None:
        for name in (
            "deadline_seconds",
            "body_timeout_seconds",
            "max_body_bytes",
            "max_inflight_requests",
            "max_inflight_body_bytes",
            "max_messages",
            "max_prompts",
            "threads",
        ):
            if getattr(self, name) <= 0:
                raise ConfigurationError(f"{name} must be positive.")
