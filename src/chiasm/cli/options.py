"""The groups of options, named as the fields of the configurations that they set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from chiasm.cli.groups import OptionGroup
from chiasm.cli.values import CpuSet, Names, parse_arguments, parse_cpus, parse_names, parse_size
from chiasm.launch.config import EngineKind

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint's folder, a hub name, or demo.")]
Host = Annotated[str, typer.Option(help="Address to listen on.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")]
ServedModelName = Annotated[
    str | None, typer.Option(help="What clients call the model.", show_default="the folder's or hub name")
]
Cpus = Annotated[
    CpuSet | None,
    typer.Option(parser=parse_cpus, metavar="CPUS", help="Run on these CPUs only, for example 0,2-3."),
]
AdminKey = Annotated[
    str | None,
    typer.Option(envvar="CHIASM_ADMIN_KEY", help="Enables /instances for whoever sends it as Bearer token."),
]
LogLevel = Annotated[str, typer.Option(help="debug, info, warning or error; logs go to stderr.")]
EndWithStdin = Annotated[
    bool, typer.Option("--end-with-stdin", help="End when standard input closes, as when its parent dies.")
]


def _size(help_text: str, default: str | bool) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(
        parser=parse_size, metavar="SIZE", help=help_text, show_default=default
    )
    return option


Devices = Annotated[
    Names | None,
    typer.Option(
        parser=parse_names, metavar="GPUS", help="GPUs, dealt out evenly, for example 0,1.", show_default="auto"
    ),
]
MemoryShare = Annotated[
    float | None,
    typer.Option(min=0.01, max=1, help="vLLM: of each GPU's memory, for one instance.", show_default="what is there"),
]
Arguments = Annotated[
    Names | None,
    typer.Option(parser=parse_arguments, metavar="ARGS", help="More arguments, in quotes, for each such instance."),
]


@dataclass(frozen=True)
class DeploymentOptions(OptionGroup):
    """Which instances a deployment has, and what all of it has in common."""

    engine: Annotated[
        EngineKind,
        typer.Option(help="What instances run: the built-in engine, or `vllm serve` of the same environment."),
    ] = EngineKind.CHIASM
    encoders: Annotated[
        int | None, typer.Option(min=0, help="Encoder instances.", show_default="1, or 0 with --aggregated")
    ] = None
    pds: Annotated[
        int | None,
        typer.Option(min=0, help="Prefill-and-decode instances.", show_default="1, or 0 if there are others"),
    ] = None
    aggregated: Annotated[int | None, typer.Option(min=0, help="Instances that do it all.", show_default="0")] = None
    prefills: Annotated[
        int | None, typer.Option(min=0, help="Prefill instances, with --decodes.", show_default="0")
    ] = None
    decodes: Annotated[int | None, typer.Option(min=0, help="Decode instances, with --prefills.", show_default="0")] = (
        None
    )
    host: Host = "127.0.0.1"
    port: Port = 8000
    served_model_name: ServedModelName = None
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Threads of each instance on CPU.", show_default="the cores shared out evenly"),
    ] = None
    encoder_cpus: Cpus = None
    pd_cpus: Cpus = None
    aggregated_cpus: Cpus = None
    prefill_cpus: Cpus = None
    decode_cpus: Cpus = None
    deadline_seconds: Annotated[
        float | None, typer.Option(help="The longest that a request may take.", show_default="600")
    ] = None
    admin_key: AdminKey = None
    log_level: LogLevel = "info"


@dataclass(frozen=True)
class DeviceOptions(OptionGroup):
    """The GPUs of each role's instances."""

    encoder_devices: Devices = None
    pd_devices: Devices = None
    aggregated_devices: Devices = None
    prefill_devices: Devices = None
    decode_devices: Devices = None
    encoder_memory_share: MemoryShare = None
    pd_memory_share: MemoryShare = None
    aggregated_memory_share: MemoryShare = None
    prefill_memory_share: MemoryShare = None
    decode_memory_share: MemoryShare = None


@dataclass(frozen=True)
class ArgumentOptions(OptionGroup):
    """Arguments that go on to the command of each process: ``chiasm instance`` or ``vllm serve``, and ``chiasm proxy``."""

    vllm_args: Annotated[
        Names | None,
        typer.Option(parser=parse_arguments, metavar="ARGS", help="More arguments, in quotes, of every `vllm serve`."),
    ] = None
    encoder_args: Arguments = None
    pd_args: Arguments = None
    aggregated_args: Arguments = None
    prefill_args: Arguments = None
    decode_args: Arguments = None
    proxy_args: Annotated[
        Names | None,
        typer.Option(parser=parse_arguments, metavar="ARGS", help="More arguments, in quotes, of `chiasm proxy`."),
    ] = None


@dataclass(frozen=True)
class EngineOptions(OptionGroup):
    """Fields of ``EngineConfig``."""

    dtype: Annotated[
        str | None, typer.Option(help="auto (float32 on CPU), float32, bfloat16 or float16.", show_default="auto")
    ] = None
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.", show_default="auto")] = None
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="Tokens of prompt and answer together.", show_default="the model's")
    ] = None
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of one step, decodes and prefill chunks.", show_default="2048")
    ] = None
    max_num_seqs: Annotated[
        int | None, typer.Option(min=1, help="Sequences that compute at the same time.", show_default="64")
    ] = None
    max_queued_requests: Annotated[
        int | None, typer.Option(min=1, help="Requests waiting for their turn.", show_default="256")
    ] = None
    max_items: Annotated[int | None, typer.Option(min=0, help="Images of one request.", show_default="16")] = None
    block_size: Annotated[int | None, typer.Option(min=1, help="Tokens of one KV block.", show_default="16")] = None
    kv_cache_bytes: Annotated[int | None, _size("Memory for the KV cache.", "from the memory that is free")] = None
    encoder_cache_bytes: Annotated[int | None, _size("Embeddings held in memory.", "512MiB")] = None


@dataclass(frozen=True)
class ECOptions(OptionGroup):
    """How embeddings travel."""

    connector: Annotated[
        str | None, typer.Option(help="What moves embeddings.", show_default="SharedStorageConnector")
    ] = None
    connector_module_path: Annotated[
        str | None, typer.Option(help="Python module of a connector that is not chiasm's own.")
    ] = None
    shared_storage_path: Annotated[
        Path | None, typer.Option(help="Folder through which instances exchange embeddings.")
    ] = None
    ec_max_bytes: Annotated[int | None, _size("Bound of the embeddings there.", "4GiB")] = None


@dataclass(frozen=True)
class KVOptions(OptionGroup):
    """How a prompt's KV travels from prefill to decode."""

    kv_connector: Annotated[
        str | None, typer.Option(help="What moves a prompt's KV.", show_default="SharedMemoryConnector")
    ] = None
    kv_connector_module_path: Annotated[
        str | None, typer.Option(help="Python module of a KV connector that is not chiasm's own.")
    ] = None
    kv_lease_seconds: Annotated[
        float | None, typer.Option(min=1, help="How long prefill holds KV that nobody asks for.", show_default="30")
    ] = None


@dataclass(frozen=True)
class KVAddressOptions(OptionGroup):
    """Where decode instances find a prefill instance."""

    kv_host: Annotated[
        str | None,
        typer.Option(help="Name or address under which they reach it, and where it listens.", show_default="127.0.0.1"),
    ] = None
    kv_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Where it listens; 0 takes a free port.", show_default="0")
    ] = None


@dataclass(frozen=True)
class MediaOptions(OptionGroup):
    """Fields of ``MediaConfig``."""

    max_media_bytes: Annotated[int | None, _size("The largest image file.", "32MiB")] = None
    max_image_pixels: Annotated[
        int | None, typer.Option(min=1, help="The largest image, height times width.", show_default="64000000")
    ] = None
    fetch_timeout_seconds: Annotated[
        float | None, typer.Option(help="One URL, redirects included.", show_default="30")
    ] = None
    allowed_local_media_path: Annotated[
        Path | None, typer.Option(help="file:// URLs may name files in this folder.", show_default="none may")
    ] = None
    allowed_media_domains: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST", help="URLs may name this host only; can be repeated.", show_default="any"),
    ] = None
    allowed_media_networks: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NETWORK",
            help="Media may come from this network though it isn't public (10.0.0.0/8); can be repeated.",
            show_default="none",
        ),
    ] = None


@dataclass(frozen=True)
class ServerOptions(OptionGroup):
    """Fields of ``ServerConfig``."""

    deadline_seconds: Annotated[
        float | None, typer.Option(help="The longest that a request may take.", show_default="600")
    ] = None
    max_body_bytes: Annotated[int | None, _size("The largest request.", "64MiB")] = None
    max_inflight_requests: Annotated[
        int | None, typer.Option(min=1, help="Requests at one time; more get 503.", show_default="1024")
    ] = None


@dataclass(frozen=True)
class ProxyOptions(OptionGroup):
    """Fields of ``ProxyConfig``."""

    deadline_seconds: Annotated[
        float | None, typer.Option(help="The longest that a request may take.", show_default="600")
    ] = None
    connect_timeout_seconds: Annotated[
        float | None, typer.Option(help="For an instance to accept a connection.", show_default="3")
    ] = None
    encode_timeout_seconds: Annotated[
        float | None, typer.Option(help="For one call of one encoder.", show_default="120")
    ] = None
    max_encode_attempts: Annotated[
        int | None, typer.Option(min=1, help="Calls that one image is given.", show_default="3")
    ] = None
    max_prefill_attempts: Annotated[
        int | None, typer.Option(min=1, help="Prefills that one request is given.", show_default="4")
    ] = None
    max_body_bytes: Annotated[int | None, _size("The largest request.", "128MiB")] = None
    max_buffered_bytes: Annotated[int | None, _size("Bodies and media held at one time.", "1GiB")] = None
    max_concurrent_requests: Annotated[
        int | None, typer.Option(min=1, help="Requests at one time; more get 503.", show_default="512")
    ] = None
    max_items: Annotated[int | None, typer.Option(min=1, help="Images of one request.", show_default="32")] = None
    probe_interval_seconds: Annotated[
        float | None, typer.Option(help="Between two looks at an instance's health.", show_default="1")
    ] = None
    probe_timeout_seconds: Annotated[
        float | None, typer.Option(help="For an instance to say how it is.", show_default="5")
    ] = None
    admin_key: AdminKey = None
