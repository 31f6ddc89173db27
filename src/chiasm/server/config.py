"""The configuration of an instance's server."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from chiasm.chat_body import MAX_MESSAGES, MAX_PARTS
from chiasm.fleet_key import FleetKeyFile
from chiasm.http.config import HttpConfig
from chiasm.http.shutdown import SHUTDOWN_TIMEOUT_SECONDS, ShutdownTimeout
from chiasm.media import MediaConfig
from chiasm.options import Option, check_not_negative, check_positive
from chiasm.server.advertise import check_proxies


@dataclass(frozen=True)
class ServerConfig:
    """Address and bounds of an instance's server. Raises ConfigurationError for a bound that is not positive."""

    host: Annotated[str, Option("Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Option("Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8000
    """``on_ready`` of :func:`chiasm.server.run` gets the URL with the port that was taken."""
    fleet_key_file: FleetKeyFile = None
    join: Annotated[
        tuple[str, ...],
        Option(
            "Proxies to join, with commas between their URLs; a name stands for all of its addresses.",
            metavar="URL[,URL]",
            separator=",",
        ),
    ] = ()
    advertise_url: Annotated[
        str, Option("URL under which proxies reach this instance.", metavar="URL", unset="--host and --port")
    ] = ""
    deadline_seconds: Annotated[float, Option("Maximum duration of a request.")] = 600.0
    """``X-Request-Deadline-Ms`` of a request can only shorten it."""
    shutdown_timeout_seconds: ShutdownTimeout = SHUTDOWN_TIMEOUT_SECONDS
    max_body_bytes: Annotated[int, Option("Maximum size of a request; a larger one gets 413.")] = 64 << 20
    max_inflight_requests: Annotated[int, Option("Maximum concurrent requests; one more gets 503.", min=1)] = 1024
    max_inflight_body_bytes: Annotated[
        int, Option("Maximum size of the bodies and images that are held at one time.")
    ] = 1 << 30
    max_messages: int = MAX_MESSAGES
    """Maximum number of messages in one chat."""
    max_parts: int = MAX_PARTS
    """Content parts and calls of tools in one chat, over all its messages."""
    max_prompts: int = 64
    """Prompts of one text completion."""
    media: MediaConfig = field(default_factory=MediaConfig)
    """Limits of images; only encoder and aggregated instances fetch them."""
    http: HttpConfig = field(default_factory=HttpConfig)
    threads: int = 2
    """Threads that tokenize, decode and preprocess, which would block the event loop."""

    def __post_init__(self) -> None:
        check_positive(
            self,
            "deadline_seconds",
            "max_body_bytes",
            "max_inflight_requests",
            "max_inflight_body_bytes",
            "max_messages",
            "max_parts",
            "max_prompts",
            "threads",
        )
        check_proxies(self.join, self.host, self.advertise_url)
        check_not_negative(self, "shutdown_timeout_seconds")
