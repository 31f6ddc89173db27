"""``chiasm doctor``: what is wrong with a deployment, and what to do about it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from chiasm.cli import serve
from chiasm.cli.parser import Parser
from chiasm.errors import ConfigurationError
from chiasm.launch.process import EC_OPTIONS
from chiasm.options import Option, fields_from, flag, names_of
from chiasm.proxy import ProxyConfig

if TYPE_CHECKING:
    from chiasm.doctor import Result

_SCHEMES = ("http://", "https://")
_FOUND_PROBLEMS = 1
_URLS = ("encoder", "pd", "prefill", "decode")
_EXAMPLES = """\
Check a running or planned deployment, and say what is wrong and what to do.

  chiasm doctor                              this machine
  chiasm doctor MODEL --encoders 2           a plan, with the options of serve
  chiasm doctor http://127.0.0.1:8000        a proxy and the instances behind it
  chiasm doctor --encoder URL --pd URL       running instances, without a proxy

The exit code is 0 if there are no problems, 1 if there are, and 2 for
wrong usage.
"""


@dataclass(frozen=True)
class DoctorConfig:
    """The command's own options."""

    aggregated_at: Annotated[
        tuple[str, ...], Option("URL of an aggregated instance; can be repeated.", metavar="URL")
    ] = ()
    timeout_seconds: Annotated[float, Option("Timeout of each request to a running instance.", min=1, max=3600)] = 30.0
    json: Annotated[bool, Option("Print the findings as JSON.")] = False


_ADDRESS = re.compile(r"[\w.-]+:\d+|\[[0-9a-fA-F:]+\](:\d+)?")
"""A host and a port, as people write them without the scheme of a URL."""
_KEYS = ("api_key", "api_key_file", "fleet_key_file")
_NOT_OF_A_PLAN = {"target", "admin_key", "admin_key_file", "log_level", *_KEYS, *_URLS, *names_of(DoctorConfig)}
"""Keys may be set in the environment; a running deployment is asked with the API key and the fleet key. The log level changes
no result."""


def parser() -> Parser:
    made = Parser("doctor", "[URL|MODEL] [OPTIONS]", _EXAMPLES)
    made.add_argument("target", metavar="URL|MODEL", nargs="?", help="Running proxy, or the model of a plan.")
    group = made.add_argument_group("doctor")
    made.add(group, DoctorConfig)
    made.add(group, ProxyConfig, only=_URLS)
    serve.add_options(made)
    return made


def run(settings: Mapping[str, Any]) -> int | None:
    """Print the results, and return the exit code."""
    config = DoctorConfig(**fields_from(settings, DoctorConfig))
    target = settings.get("target")
    urls = {"aggregated": config.aggregated_at} | {role: settings.get(role, ()) for role in _URLS}
    instances = {role: [_base_url(url) for url in named] for role, named in urls.items() if named}
    running = bool(instances) or (target is not None and target.startswith(_SCHEMES))
    if target is not None and not running and _ADDRESS.fullmatch(target) and not Path(target).exists():
        raise ConfigurationError(f"{target} is no model. To examine what runs there, name its URL: http://{target}")
    if instances and target is not None:
        raise ConfigurationError("Name either instances, or one proxy or model, but not both.")
    about_storage = names_of(*EC_OPTIONS)
    of_plan = settings.keys() - _NOT_OF_A_PLAN - about_storage
    if running and of_plan:
        raise ConfigurationError(f"A running deployment has its options already; leave out {_flags(of_plan)}.")
    of_plan |= settings.keys() & about_storage
    if target is None and not instances and of_plan - {"ec_store"}:
        raise ConfigurationError(f"{_flags(of_plan)} describe a planned deployment: name its MODEL too.")

    results: AsyncIterator[Result]
    if running:
        results = _examine_running(target, instances, config.timeout_seconds, settings)
    elif target is None:
        results = _examine_machine(settings.get("ec_store", ""))
    else:
        from chiasm.doctor.planned import examine_plan

        results = examine_plan(serve.deployment_config({**settings, "model": target}))
    return _FOUND_PROBLEMS if asyncio.run(_show(results, in_json=config.json)) else None


async def _show(results: AsyncIterator[Result], *, in_json: bool) -> bool:
    """Print each result as it comes, or all as JSON at the end; return whether there are problems."""
    from chiasm.doctor import has_problem
    from chiasm.doctor.report import Report, as_json

    found: list[Result] = []
    report = None if in_json else Report()
    async for result in results:
        found.append(result)
        if report is not None:
            report.show(result)
        await asyncio.sleep(0)  # where Ctrl-C ends it, since most checks don't wait for anything
    if report is None:
        print(as_json(found))
    else:
        report.end(found)
    return has_problem(found)


def _examine_running(
    target: str | None, instances: Mapping[str, Sequence[str]], timeout_seconds: float, settings: Mapping[str, Any]
) -> AsyncIterator[Result]:
    from chiasm.doctor.client import Limits
    from chiasm.doctor.running import Folder, examine_instances, examine_proxy
    from chiasm.fleet_key import read_fleet_key
    from chiasm.http.key_file import read_api_keys
    from chiasm.http.key_rules import read_admin_keys

    folder = None
    if "shared_storage_path" in settings:
        bound = {"max_bytes": settings["ec_max_bytes"]} if "ec_max_bytes" in settings else {}
        folder = Folder(settings["shared_storage_path"], **bound)
    limits, store_url = Limits(timeout_seconds), settings.get("ec_store", "")
    keys = [*settings.get("api_key", ())]
    if "api_key_file" in settings:
        keys += [one.key for one in read_api_keys(settings["api_key_file"])]
    key = next(filter(None, keys), None)
    fleet_key = read_fleet_key(settings.get("fleet_key_file"))
    admin_keys = read_admin_keys(settings.get("admin_key"), settings.get("admin_key_file"))
    if target is not None:
        return examine_proxy(
            _base_url(target),
            limits=limits,
            folder=folder,
            store_url=store_url,
            key=key,
            fleet_key=fleet_key,
            admin_key=next(iter(admin_keys), None),
        )
    return examine_instances(instances, limits=limits, folder=folder, store_url=store_url, key=key, fleet_key=fleet_key)


async def _examine_machine(store_url: str) -> AsyncIterator[Result]:
    from chiasm.doctor.planned import examine_machine

    for result in examine_machine(store_url):
        yield result


def _base_url(url: str) -> str:
    from chiasm.http.listen import check_url

    return check_url(url.rstrip("/").removesuffix("/v1"))


def _flags(names: set[str]) -> str:
    return ", ".join(map(flag, sorted(names)))
