"""``chiasm proxy``: the front door alone."""

from __future__ import annotations

from typing import Annotated

import typer

from chiasm.cli import options
from chiasm.cli.process import log_to_stderr, print_ready


def proxy(
    proxy_options: options.ProxyOptions,
    media: options.MediaOptions,
    encoder: Annotated[list[str] | None, typer.Option(metavar="URL", help="An encoder; can be repeated.")] = None,
    pd: Annotated[list[str] | None, typer.Option(metavar="URL", help="A pd instance; can be repeated.")] = None,
    aggregated: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="An aggregated instance; can be repeated.")
    ] = None,
    prefill: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="A prefill instance; can be repeated.")
    ] = None,
    decode: Annotated[list[str] | None, typer.Option(metavar="URL", help="A decode instance; can be repeated.")] = None,
    host: options.Host = "127.0.0.1",
    port: options.Port = 8000,
    cpus: options.Cpus = None,
    log_level: options.LogLevel = "info",
    end_with_stdin: options.EndWithStdin = False,
) -> None:
    """Run the proxy in front of instances; prints `ready http://HOST:PORT` when it takes requests."""
    from chiasm.cores import pin_to
    from chiasm.launch.lifeline import end_with_stdin as watch_stdin
    from chiasm.launch.ports import HeldPort

    if end_with_stdin:
        watch_stdin()
    log_to_stderr(log_level)
    pin_to(cpus or ())
    HeldPort(host, port).release()

    from chiasm.media import MediaConfig
    from chiasm.proxy import ProxyConfig, run

    run(
        ProxyConfig(
            host,
            port,
            encoders=tuple(encoder or ()),
            pds=tuple(pd or ()),
            aggregated=tuple(aggregated or ()),
            prefills=tuple(prefill or ()),
            decodes=tuple(decode or ()),
            media=MediaConfig(**media.given()),
            **proxy_options.given(),
        ),
        on_ready=print_ready,
    )
