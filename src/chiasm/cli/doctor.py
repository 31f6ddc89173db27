"""``chiasm doctor``: what is wrong with a deployment, and what to do about it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from chiasm.cli import options
from chiasm.cli.serve import configured

if TYPE_CHECKING:
    from chiasm.doctor import Finding

_SCHEMES = ("http://", "https://")
_FOUND_PROBLEMS = 1
_OF_NO_ACCOUNT = ("--admin-key", "--log-level")
"""The first may be set by the environment; neither changes what is found."""


def doctor(
    deployment: options.DeploymentOptions,
    options_of_engine: options.EngineOptions,
    devices: options.DeviceOptions,
    arguments: options.ArgumentOptions,
    ec: options.ECOptions,
    kv: options.KVOptions,
    media: options.MediaOptions,
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="[URL|MODEL]",
            help="The proxy of a deployment that runs, or the model of one that is planned.",
            show_default="this machine alone",
        ),
    ] = None,
    encoder: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="An encoder that runs; can be repeated.")
    ] = None,
    pd: Annotated[list[str] | None, typer.Option(metavar="URL", help="A pd instance; can be repeated.")] = None,
    aggregated_at: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="An aggregated instance; can be repeated.")
    ] = None,
    prefill: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="A prefill instance; can be repeated.")
    ] = None,
    decode: Annotated[list[str] | None, typer.Option(metavar="URL", help="A decode instance; can be repeated.")] = None,
    timeout_seconds: Annotated[
        float, typer.Option(min=1, max=3600, help="The longest that each message to a running instance may take.")
    ] = 30.0,
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check a deployment that runs or is planned, and say in plain words what is wrong and what to do.

    \b
    chiasm doctor                              this machine
    chiasm doctor MODEL --encoders 2           planned: the options of `chiasm serve`
    chiasm doctor http://127.0.0.1:8000        running: the proxy, and the instances behind it
    chiasm doctor --encoder URL --pd URL       running: instances without a proxy

    The exit code is 0 without problems, 1 with problems, 2 for wrong usage.
    """
    named = {"encoder": encoder, "pd": pd, "aggregated": aggregated_at, "prefill": prefill, "decode": decode}
    instances = {role: [_base_url(url) for url in urls] for role, urls in named.items() if urls}
    running = bool(instances) or (target is not None and target.startswith(_SCHEMES))
    if instances and target is not None:
        raise typer.BadParameter("name instances, or one proxy or model, not both", param_hint="--encoder, --pd, …")
    planning = (deployment, options_of_engine, devices, arguments, kv, media)
    asked = [name for group in planning for name in group.changed if name not in _OF_NO_ACCOUNT]
    if running and asked:
        raise typer.BadParameter("a deployment that runs has its options already", param_hint=", ".join(asked))
    if target is None and not instances and (asked or ec.names):
        raise typer.BadParameter("name the MODEL that is planned", param_hint=", ".join([*asked, *ec.names]))

    findings: AsyncIterator[Finding]
    if running:
        findings = _examine_running(target, instances, timeout_seconds, ec)
    elif target is None:
        findings = _examine_machine()
    else:
        from chiasm.doctor.planned import Wanted, examine_plan

        config = configured(target, deployment, options_of_engine, devices, arguments, ec, kv, media)
        given = options_of_engine.given()
        wanted = Wanted(**{name: given[name] for name in ("dtype", "device", "kv_cache_bytes") if name in given})
        findings = examine_plan(config, wanted)
    if asyncio.run(_show(findings, in_json=json)):
        raise typer.Exit(_FOUND_PROBLEMS)


async def _show(findings: AsyncIterator[Finding], *, in_json: bool) -> bool:
    """Each finding as it comes; tells whether there were problems."""
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
    target: str | None, instances: Mapping[str, Sequence[str]], timeout_seconds: float, ec: options.ECOptions
) -> AsyncIterator[Finding]:
    from chiasm.doctor.running import Folder, examine_instances, examine_proxy

    folder = None
    if ec.shared_storage_path is not None:
        bound = {} if ec.ec_max_bytes is None else {"max_bytes": ec.ec_max_bytes}
        folder = Folder(ec.shared_storage_path, **bound)
    if target is not None:
        return examine_proxy(_base_url(target), timeout_seconds=timeout_seconds, folder=folder)
    return examine_instances(instances, timeout_seconds=timeout_seconds, folder=folder)


async def _examine_machine() -> AsyncIterator[Finding]:
    from chiasm.doctor.planned import examine_machine

    for finding in examine_machine():
        yield finding


def _base_url(url: str) -> str:
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise typer.BadParameter(f"{url!r} is no URL; write for example http://127.0.0.1:8000")
    return url.rstrip("/").removesuffix("/v1")
