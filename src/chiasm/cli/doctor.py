"""``chiasm doctor``: what is wrong with a deployment, and what to do about it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from chiasm.cli import serve
from chiasm.cli.parser import Parser
from chiasm.ec_transfer import ECTransferConfig
from chiasm.errors import ConfigurationError
from chiasm.options import Option, fields_from, flag, names_of
from chiasm.proxy import ProxyConfig

if TYPE_CHECKING:
    from chiasm.doctor import Finding

_SCHEMES = ("http://", "https://")
_FOUND_PROBLEMS = 1
_URLS = ("encoder", "pd", "prefill", "decode")
_EXAMPLES = """\
Check a deployment that runs or is planned, and say in plain words what is wrong and what to do.

  chiasm doctor                              this machine
  chiasm doctor MODEL --encoders 2           planned: the options of `chiasm serve`
  chiasm doctor http://127.0.0.1:8000        running: the proxy, and the instances behind it
  chiasm doctor --encoder URL --pd URL       running: instances without a proxy

The exit code is 0 without problems, 1 with problems, 2 for wrong usage.
"""


@dataclass(frozen=True)
class DoctorConfig:
    """The command's own options."""

    aggregated_at: Annotated[
        tuple[str, ...], Option("URL of an aggregated instance; can be repeated.", metavar="URL")
    ] = ()
    timeout_seconds: Annotated[float, Option("Timeout of each request to a running instance.", min=1, max=3600)] = 30.0
    json: Annotated[bool, Option("Print the findings as JSON.")] = False


_OF_NO_PLAN = {"target", "admin_key", "log_level", *_URLS, *names_of(DoctorConfig)}
"""The key may be set by the environment, and changes no finding; nor does the log's level."""


def parser() -> Parser:
    made = Parser("doctor", "[URL|MODEL] [OPTIONS]", _EXAMPLES)
    made.add_argument("target", metavar="URL|MODEL", nargs="?", help="A running proxy, or the model that is planned.")
    group = made.add_argument_group("doctor")
    made.add(group, DoctorConfig)
    made.add(group, ProxyConfig, only=_URLS)
    serve.add_options(made)
    return made


def run(settings: Mapping[str, Any]) -> int | None:
    """Print what is found, and return the exit code."""
    config = DoctorConfig(**fields_from(settings, DoctorConfig))
    target = settings.get("target")
    urls = {"aggregated": config.aggregated_at} | {role: settings.get(role, ()) for role in _URLS}
    instances = {role: [_base_url(url) for url in named] for role, named in urls.items() if named}
    running = bool(instances) or (target is not None and target.startswith(_SCHEMES))
    if instances and target is not None:
        raise ConfigurationError("Name instances, or one proxy or model, but not both.")
    about_storage = names_of(ECTransferConfig)
    of_plan = settings.keys() - _OF_NO_PLAN - about_storage
    if running and of_plan:
        raise ConfigurationError(f"A running deployment has its options already; leave out {_flags(of_plan)}.")
    of_plan |= settings.keys() & about_storage
    if target is None and not instances and of_plan:
        raise ConfigurationError(f"Name the MODEL that is planned with {_flags(of_plan)}.")

    findings: AsyncIterator[Finding]
    if running:
        findings = _examine_running(target, instances, config.timeout_seconds, settings)
    elif target is None:
        findings = _examine_machine()
    else:
        from chiasm.doctor.planned import Wanted, examine_plan

        planned = serve.deployment_config({**settings, "model": target})
        names = ("dtype", "device", "kv_cache_bytes")
        findings = examine_plan(planned, Wanted(**{name: settings[name] for name in names if name in settings}))
    return _FOUND_PROBLEMS if asyncio.run(_show(findings, in_json=config.json)) else None


async def _show(findings: AsyncIterator[Finding], *, in_json: bool) -> bool:
    """Show each finding as it comes; return whether there were problems."""
    from chiasm.doctor import has_problem
    from chiasm.doctor.report import Report, as_json

    found: list[Finding] = []
    shown = None if in_json else Report()
    async for finding in findings:
        found.append(finding)
        if shown is not None:
            shown.show(finding)
    if shown is None:
        print(as_json(found))
    else:
        shown.end(found)
    return has_problem(found)


def _examine_running(
    target: str | None, instances: Mapping[str, Sequence[str]], timeout_seconds: float, settings: Mapping[str, Any]
) -> AsyncIterator[Finding]:
    from chiasm.doctor.running import Folder, examine_instances, examine_proxy

    folder = None
    if "shared_storage_path" in settings:
        bound = {"max_bytes": settings["ec_max_bytes"]} if "ec_max_bytes" in settings else {}
        folder = Folder(settings["shared_storage_path"], **bound)
    if target is not None:
        return examine_proxy(_base_url(target), timeout_seconds=timeout_seconds, folder=folder)
    return examine_instances(instances, timeout_seconds=timeout_seconds, folder=folder)


async def _examine_machine() -> AsyncIterator[Finding]:
    from chiasm.doctor.planned import examine_machine

    for finding in examine_machine():
        yield finding


def _base_url(url: str) -> str:
    from chiasm.http.listen import check_url

    return check_url(url.rstrip("/").removesuffix("/v1"))


def _flags(names: set[str]) -> str:
    return ", ".join(map(flag, sorted(names)))
