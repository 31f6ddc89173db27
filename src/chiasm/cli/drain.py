"""``chiasm drain``: takes an instance down without losing anything."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from chiasm.cli.parser import Parser
from chiasm.errors import ConfigurationError
from chiasm.fleet_key import FleetKeyFile, read_fleet_key
from chiasm.http.listen import check_url
from chiasm.options import Option, fields_from

_IN_TIME, _LATE = 0, 1
_ABOUT = """\
Take an instance down without losing anything: it takes no new work, answers
what it has, lets others fetch the KV and the embeddings that they need, and
ends with exit code 0.

With --wait, the exit code is 0 when the instance has ended, and 1 if that
takes longer than --timeout-seconds; it goes on draining then. The instance
must be reached from here: with a fleet key from anywhere, without one from
its own machine.
"""


@dataclass(frozen=True)
class DrainConfig:
    """The command's own options."""

    proxy: Annotated[
        str | None,
        Option(
            "Ask this proxy, which gives the instance no work from then on, in place of the instance.", metavar="URL"
        ),
    ] = None
    admin_key: Annotated[
        str | None, Option("Admin key of the proxy.", metavar="KEY", environment="CHIASM_ADMIN_KEY")
    ] = None
    wait: Annotated[bool, Option("Wait until the instance has ended.")] = False
    timeout_seconds: Annotated[float, Option("How long to wait, with --wait.", min=0)] = 900.0
    """Longer than the deadline of a request."""
    fleet_key_file: FleetKeyFile = None


def parser() -> Parser:
    made = Parser("drain", "URL [OPTIONS]", _ABOUT)
    made.add_argument("url", metavar="URL", help="The instance.")
    made.add("drain", DrainConfig)
    return made


def run(settings: Mapping[str, Any]) -> int:
    from chiasm.launch.drain import Drain

    config = DrainConfig(**fields_from(settings, DrainConfig))
    if "timeout_seconds" in settings and not config.wait:
        raise ConfigurationError("--timeout-seconds is for --wait; give that too, or leave out --timeout-seconds.")
    drain = Drain(
        check_url(settings["url"]),
        key=read_fleet_key(config.fleet_key_file),
        proxy=check_url(config.proxy) if config.proxy else None,
        admin_key=config.admin_key,
    )
    return _IN_TIME if asyncio.run(_drain(drain, config)) else _LATE


async def _drain(drain: Any, config: DrainConfig) -> bool:
    async with drain:
        state = await drain.begin()
        left = f"{state.requests} requests, {state.kv} prompts and {state.embeddings} embeddings to be fetched"
        print(f"{drain.url} drains: {left}.", flush=True)
        if not config.wait:
            return True
        has_ended: bool = await drain.ended(state, config.timeout_seconds)
        print(
            f"{drain.url} has ended." if has_ended else f"{drain.url} still drains after {config.timeout_seconds:g} s."
        )
        return has_ended
