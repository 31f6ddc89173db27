"""What the HTTP front of every server of chiasm can be told: who may use it, what it costs at most, and what it logs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from chiasm.errors import ConfigurationError
from chiasm.http.json_size import MAX_TEXT_BYTES
from chiasm.http.key_rules import check_key
from chiasm.options import Option

FAILURES, REQUESTS, ALL = ACCESS_LOGS = ("failures", "requests", "all")


@dataclass(frozen=True)
class HttpConfig:
    """The settings of a front door. Those of CORS and of API keys have vLLM's names, forms and defaults.

    Raises ConfigurationError for a key that isn't fit.
    """

    allowed_origins: Annotated[
        tuple[str, ...],
        Option("Origins whose web pages may use the API.", json='["https://example.com"]', unset="none"),
    ] = ()
    allowed_methods: Annotated[
        tuple[str, ...],
        Option("Methods that these web pages may use.", json='["GET","POST"]'),
    ] = ("*",)
    allowed_headers: Annotated[
        tuple[str, ...],
        Option("Headers that these web pages may send.", json='["Authorization"]'),
    ] = ("*",)
    allowed_hosts: Annotated[
        tuple[str, ...],
        Option(
            "Names under which web pages may ask a server that listens on loopback alone, besides localhost and addresses.",
            json='["example.com"]',
            unset="none",
        ),
    ] = ()
    allow_credentials: Annotated[bool, Option("Let these web pages send cookies and the like.")] = False
    api_key: Annotated[
        tuple[str, ...],
        Option(
            "Bearer token that requests below /v1 must have, of at least 16 characters; can be repeated, and each is enough.",
            metavar="KEY",
            environment="CHIASM_API_KEY",
        ),
    ] = field(default=(), repr=False)
    api_key_file: Annotated[
        Path | None,
        Option(
            "File with such keys, one a line, or in YAML with names, tenants and limits; read again when it is replaced."
        ),
    ] = None
    keys_of_instances: tuple[str, ...] = field(default=(), repr=False)
    """Keys that requests may have because the instances behind this proxy take them; of any length, as those of vLLM."""
    ssl_certfile: Annotated[
        Path | None, Option("Certificate in PEM, for HTTPS; read again when it is replaced.", unset="none: plain HTTP")
    ] = None
    ssl_keyfile: Annotated[Path | None, Option("Its private key.", unset="in the same file")] = None
    access_log: Annotated[
        str | None,
        Option(
            "Which requests leave a line in the log: those that fail, all that ask for an answer, or all, as those of pages "
            "and probes, whatever the level of the log.",
            choices=ACCESS_LOGS,
            unset="requests at the proxy, failures at an instance",
        ),
    ] = None
    timing_comments: Annotated[
        str,
        Option(
            "Whether streams contain timing, in lines that begin with a colon; the header X-Timing-Comments of a request "
            "overrides it.",
            choices=("on", "off"),
        ),
    ] = "on"
    max_header_bytes: Annotated[
        int, Option("Maximum size of the request line and the headers; larger ones get 431.", min=1024)
    ] = 64 << 10
    max_header_fields: Annotated[int, Option("Maximum header fields of a request; more get 431.", min=16)] = 128
    max_text_bytes: Annotated[
        int, Option("Maximum size of a request besides its images in base64; a larger one gets 413.", min=1024)
    ] = MAX_TEXT_BYTES
    header_timeout_seconds: Annotated[
        float, Option("Time for the request line and the headers to arrive; later ones get 408.", min=0.1)
    ] = 10.0
    body_timeout_seconds: Annotated[float, Option("Time for a body to arrive; a later one gets 408.", min=0.1)] = 60.0
    min_body_bytes_per_second: Annotated[
        int, Option("Bytes of a body that must arrive each second, averaged after ten; fewer get 408. 0: any.", min=0)
    ] = 1024
    max_connections: Annotated[
        int, Option("Maximum open connections; idle ones make way, and one more gets 503.", min=1)
    ] = 4096
    max_connections_per_peer: Annotated[
        int,
        Option(
            "The same for one address, which may be that of a load balancer; in IPv6 for a network of 64 bits.", min=1
        ),
    ] = 2048
    max_request_share: Annotated[
        float, Option("Part of the bytes held at one time that one request may hold; more get 413.", min=0.01, max=1)
    ] = 0.25
    small_request_bytes: Annotated[
        int, Option("Size up to which a request is small, and finds room where others don't.", min=0)
    ] = 1 << 20
    small_request_share: Annotated[
        float, Option("Part of the bytes held at one time that is kept for small requests.", min=0, max=0.9)
    ] = 0.125
    discard_seconds: Annotated[
        float, Option("Time to read on what a client still sends after it was answered, so that it sees why.", min=0)
    ] = 2.0
    discard_bytes: Annotated[int, Option("Maximum bytes that are read on then.", min=0)] = 64 << 20

    @property
    def scheme(self) -> str:
        """What URLs of the server begin with."""
        return "http" if self.ssl_certfile is None else "https"

    @property
    def needs_key(self) -> bool:
        """Whether requests need an API key."""
        return bool(self.api_key or self.keys_of_instances) or self.api_key_file is not None

    def __post_init__(self) -> None:
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise ConfigurationError("--ssl-keyfile needs --ssl-certfile, the certificate to which the key belongs.")
        for key in self.api_key:
            check_key("--api-key or CHIASM_API_KEY", key)
        if not all(self.keys_of_instances):
            raise ConfigurationError("--api-key: a key must not be empty.")
