"""``chiasm serve --dry-run``: what would be started, as commands that a person could type."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from chiasm.launch.deployment import Deployment
from chiasm.launch.devices import describe
from chiasm.launch.plan import ProcessPlan
from chiasm.launch.process import INSTANCE_OPTIONS, PROXY_OPTIONS
from chiasm.options import NamedOption, options_of

_HIDDEN = "…"
_SECRET_NAME = re.compile(r"key$|password$|secret$|(?:^|[_-])token$", re.IGNORECASE)
_SECRET_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")


def preview(deployment: Deployment) -> str:
    """Return the processes of a deployment that hasn't been started, without secrets. Raises ConfigurationError."""
    placed = describe(deployment.placements)
    lines = [deployment.arrangement.description, *([placed] if placed else [])]
    plans = deployment.preview()
    for plan in plans:
        placement = deployment.placements[plan.role, plan.index] if plan.role is not None else None
        where = f" on GPU {', '.join(placement.devices)}" if placement is not None and placement.devices else ""
        when = ", only while it is needed" if deployment.arrangement.is_spare(plan.role, plan.index) else ""
        lines += [
            "",
            f"{plan.name}: {plan.address.url}{where}{when}",
            f"  {shlex.join(_command(plan, deployment.folder))}",
        ]
    lines += ["", "Nothing was started. A start takes other free ports, and makes a fleet key unless it is given one."]
    if deployment.scratch is not None:
        lines.append(
            f"It also makes the folder {deployment.scratch}. Before you type these commands: mkdir -m 700 {deployment.scratch}"
        )
    if deployment.arrangement.config.scales:
        lines.append("The file there that --discover names lists the encoders that run.")
    return "\n".join(lines)


def _command(plan: ProcessPlan, folder: Path) -> list[str]:
    """Return the command line of a process; of one that gets its configuration otherwise, one that says the same."""
    added = {name: text for name, text in plan.environment.items() if os.environ.get(name) != text}
    variables = [f"{name}={_HIDDEN if _SECRET_NAME.search(name) else text}" for name, text in sorted(added.items())]
    if not plan.settings:
        return [*variables, *_without_secrets(plan.command)]
    if plan.role is None:
        return [*variables, "chiasm", "proxy", *_arguments(plan.settings, PROXY_OPTIONS)]
    named = ["chiasm", "instance", str(folder), "--role", plan.role.value]
    return [*variables, *named, *_arguments(plan.settings, INSTANCE_OPTIONS)]


def _arguments(settings: Mapping[str, Any], configurations: tuple[type, ...]) -> Iterator[str]:
    options: dict[str, NamedOption] = {}
    for config in configurations:
        options |= {option.name: option for option in options_of(config)}
    for name, value in settings.items():
        option = options[name]
        if value is None or value is False or value in ((), ""):
            continue
        if value is True:
            yield option.flag
            continue
        for text in _texts(option, value):
            yield from (option.flag, _HIDDEN if _SECRET_NAME.search(name) else _SECRET_IN_URL.sub(f"{_HIDDEN}@", text))


def _texts(option: NamedOption, value: Any) -> list[str]:
    if option.option.json:
        return [json.dumps(value, default=str)]
    if not isinstance(value, tuple):
        return [str(value).removesuffix(".0") if isinstance(value, float) else str(value)]
    texts = [str(one) for one in value]
    is_one = bool(option.option.separator) or option.type == tuple[int, ...]
    return [(option.option.separator or ",").join(texts)] if is_one else texts


def _without_secrets(command: list[str]) -> list[str]:
    shown: list[str] = []
    is_secret = False
    for argument in command:
        name, equals, _ = argument.partition("=")
        if argument.startswith("-"):
            is_secret = bool(_SECRET_NAME.search(name))  # and so are all values of this flag
        if is_secret and not argument.startswith("-"):
            shown.append(_HIDDEN)
        elif is_secret and equals:
            shown.append(f"{name}={_HIDDEN}")
        else:
            shown.append(_SECRET_IN_URL.sub(f"{_HIDDEN}@", argument))
    return shown
