"""The settings of a proxy."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from chiasm.ec_transfer.stores import StoreAddress, StoreURL
from chiasm.errors import ConfigurationError
from chiasm.fleet_key import FleetKeyFile
from chiasm.http.config import HttpConfig
from chiasm.http.key_rules import check_key
from chiasm.http.listen import check_instance_url
from chiasm.http.shutdown import SHUTDOWN_TIMEOUT_SECONDS, ShutdownTimeout
from chiasm.media import MediaConfig
from chiasm.options import Option, check_not_negative, check_positive
from chiasm.proxy.hedging import HEDGED_SHARE
from chiasm.proxy.records.tracing import traces_url
from chiasm.proxy.tenants import TenantBy

_POSITIVE = (
    "deadline_seconds",
    "connect_timeout_seconds",
    "encode_timeout_seconds",
    "encode_wait_seconds",
    "store_timeout_seconds",
    "max_encode_attempts",
    "max_prefill_attempts",
    "max_body_bytes",
    "max_buffered_bytes",
    "max_answer_bytes",
    "max_concurrent_requests",
    "max_waiting_requests",
    "max_items",
    "probe_interval_seconds",
    "probe_timeout_seconds",
    "busy_probe_timeout_seconds",
)


@dataclass(frozen=True)
class ProxyConfig:
    """Raises ConfigurationError for settings that cannot work: instances none of which can answer, roles that don't go
    together, a URL given twice, a limit that isn't positive. Without any instance, the proxy waits for some to join."""

    host: Annotated[str, Option("Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Option("Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8000
    encoders: Annotated[
        tuple[str, ...], Option("URL of an encoder; can be repeated.", name="encoder", metavar="URL")
    ] = ()
    pds: Annotated[tuple[str, ...], Option("URL of a PD instance; can be repeated.", name="pd", metavar="URL")] = ()
    aggregated: Annotated[
        tuple[str, ...], Option("URL of an aggregated instance; can be repeated.", metavar="URL")
    ] = ()
    prefills: Annotated[
        tuple[str, ...], Option("URL of a prefill instance; can be repeated.", name="prefill", metavar="URL")
    ] = ()
    """With ``decodes``, in place of PDs and aggregated instances."""
    decodes: Annotated[
        tuple[str, ...], Option("URL of a decode instance; can be repeated.", name="decode", metavar="URL")
    ] = ()
    discover: Annotated[
        tuple[str, ...],
        Option(
            "Where else instances are: file:PATH, dns:NAME:PORT or k8s:SELECTOR; can be repeated.", metavar="SOURCE"
        ),
    ] = ()
    admin_key: Annotated[
        str | None,
        Option(
            "Bearer token that may use /instances, of at least 16 characters.",
            metavar="KEY",
            environment="CHIASM_ADMIN_KEY",
        ),
    ] = field(default=None, repr=False)
    admin_key_file: Annotated[
        Path | None, Option("File with such keys, one a line; other users of the machine don't see them there.")
    ] = None
    proxies: Annotated[
        int, Option("Number of proxies behind one address, which divide the limits of API keys among them.", min=1)
    ] = 1
    supervisor_key: str | None = field(default=None, repr=False)
    """Bearer token by which the process that has started the proxy may see what its operator may."""
    open_metrics: Annotated[
        bool, Option("Let everybody read /metrics, also if there is an admin key or an API key.")
    ] = False
    fleet_key_file: FleetKeyFile = None
    tenant_by: Annotated[
        TenantBy,
        Option(
            "What keeps the caches of tenants apart: the cache_salt of their requests, or their keys (Authorization) as well."
        ),
    ] = TenantBy.SALT
    deadline_seconds: Annotated[float, Option("Maximum duration of a request.")] = 600.0
    """From a request's arrival to the last byte of its answer."""
    connect_timeout_seconds: Annotated[float, Option("Timeout of connecting to an instance.")] = 3.0
    encode_timeout_seconds: Annotated[
        float, Option("Timeout of one encoder call; its images then go to another encoder.")
    ] = 120.0
    max_encode_attempts: Annotated[int, Option("Maximum encoder attempts per image.", min=1)] = 3
    hedged_share: Annotated[
        float,
        Option(
            "Part of the calls to encoders that may be hedged: a late call's images go to a second encoder too; 0: none.",
            min=0,
            max=0.5,
        ),
    ] = HEDGED_SHARE
    encode_wait_seconds: Annotated[
        float,
        Option(
            "How long images should wait for encoders; chiasm_fleet_desired_instances counts as many as that takes."
        ),
    ] = 0.5
    encoder_start_seconds: Annotated[
        float,
        Option(
            "What an encoder takes to start; chiasm_fleet_desired_instances counts no more encoders for what is done by then."
        ),
    ] = 1.5
    scale_down_seconds: Annotated[
        float, Option("Calm while after which chiasm_fleet_desired_instances counts fewer encoders.")
    ] = 300.0
    max_prefill_attempts: Annotated[int, Option("Maximum prefills per request, the first included.", min=1)] = 4
    """A prompt is prefilled again after a prefill instance is lost, and to resume after a decode instance is."""
    max_body_bytes: Annotated[int, Option("Maximum size of a request; a larger one gets 413.")] = 128 << 20
    max_buffered_bytes: Annotated[int, Option("Maximum size of the bodies and images that are held at one time.")] = (
        1 << 30
    )
    max_answer_bytes: int = 64 << 20
    """The longest answer of an instance that isn't a stream."""
    max_concurrent_requests: Annotated[int, Option("Maximum concurrent requests; one more gets 503.", min=1)] = 512
    store: StoreURL = field(default="", repr=False)
    store_timeout_seconds: Annotated[
        float,
        Option("How long a request waits for what --ec-store has of its images.", name="ec_store_timeout_seconds"),
    ] = 0.002
    wait_for_instance_seconds: Annotated[
        float,
        Option(
            "How long a request waits for an instance that was just lost or is starting, if no other can answer; 0: not."
        ),
    ] = 15.0
    max_waiting_requests: Annotated[
        int, Option("Maximum requests that wait for such an instance; one more gets 503.", min=1)
    ] = 256
    """They count in ``max_concurrent_requests`` too."""
    max_items: Annotated[int, Option("Maximum images in one request.", min=1)] = 32
    """A lower limit of an instance also applies."""
    probe_interval_seconds: Annotated[float, Option("Interval between the health probes of an instance.")] = 1.0
    probe_timeout_seconds: Annotated[float, Option("Timeout of a health probe.")] = 5.0
    busy_probe_timeout_seconds: Annotated[
        float,
        Option(
            "The same while the instance has work and sends nothing; after two such probes, its work goes elsewhere."
        ),
    ] = 1.0
    """Not more than ``probe_timeout_seconds``."""
    otlp_traces_endpoint: Annotated[
        str | None,
        Option(
            "URL to which spans of requests are posted, by OTLP over HTTP; OTEL_… variables say more.",
            metavar="URL",
            unset="none are",
        ),
    ] = field(default=None, repr=False)
    shutdown_timeout_seconds: ShutdownTimeout = SHUTDOWN_TIMEOUT_SECONDS
    media: MediaConfig = field(default_factory=MediaConfig)
    http: HttpConfig = field(default_factory=HttpConfig)

    @property
    def has_admin(self) -> bool:
        """Whether there is a key that may change the instances."""
        return self.admin_key is not None or self.admin_key_file is not None

    @property
    def named(self) -> tuple[str, ...]:
        """The URLs of the instances that options name."""
        return (*self.encoders, *self.pds, *self.aggregated, *self.prefills, *self.decodes)

    def __post_init__(self) -> None:
        check_positive(self, *_POSITIVE)
        check_not_negative(
            self,
            "wait_for_instance_seconds",
            "shutdown_timeout_seconds",
            "encoder_start_seconds",
            "scale_down_seconds",
        )
        if self.store:
            StoreAddress.parse(self.store)
        if self.otlp_traces_endpoint is not None:
            traces_url(self.otlp_traces_endpoint)
        urls = [check_instance_url(url) for url in self.named]
        if len(set(urls)) != len(urls):
            raise ConfigurationError("An instance's URL is given twice; each instance has one role.")
        whole, parts = (self.pds or self.aggregated), (self.prefills or self.decodes)
        if whole and parts:
            raise ConfigurationError(
                "Prefill and decode instances can't be combined with PD or aggregated instances; "
                "run one proxy for each of the two kinds."
            )
        if self.admin_key is not None:
            check_key("--admin-key or CHIASM_ADMIN_KEY", self.admin_key)
        if self.has_admin or self.discover or not (whole or parts or self.encoders):
            return  # missing instances can be added later, or join
        if parts and not (self.prefills and self.decodes):
            missing = "decode" if self.prefills else "prefill"
            raise ConfigurationError(
                f"Prefill and decode instances need each other; give at least one {missing} instance, or give no instance and "
                "let all of them join."
            )
        if not whole and not parts:
            raise ConfigurationError(
                "No instance can answer; give at least one PD or aggregated instance, or a prefill and a decode instance, or "
                "give no instance and let all of them join."
            )
