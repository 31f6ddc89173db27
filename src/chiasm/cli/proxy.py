"""``chiasm proxy``: the proxy alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chiasm.cli.instance import END_WITH_STDIN
from chiasm.cli.parser import Parser
from chiasm.http.config import HttpConfig
from chiasm.launch.child import end_with_stdin
from chiasm.launch.process import ProxyProcess, proxy_process
from chiasm.launch.run import run_proxy
from chiasm.media import MediaConfig
from chiasm.proxy import ProxyConfig


def parser() -> Parser:
    made = Parser(
        "proxy",
        "--encoder URL --pd URL [OPTIONS]",
        "Run the proxy in front of instances.\n\nPrints `ready http://HOST:PORT` when it takes requests.",
        has_sources=True,
    )
    made.add_option(END_WITH_STDIN)
    add_options(made)
    return made


def add_options(made: Parser) -> None:
    """Add what ``--proxy-args`` may contain."""
    made.add("proxy", ProxyConfig)
    made.add("process", ProxyProcess)
    made.add("HTTP", HttpConfig)
    made.add("images", MediaConfig)


def run(settings: Mapping[str, Any]) -> None:
    if settings.get("end_with_stdin"):
        end_with_stdin()
    run_proxy(proxy_process(settings))
