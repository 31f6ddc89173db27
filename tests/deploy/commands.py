"""The commands of ``deploy/``, as chiasm's own parsers and configurations read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from starlette.routing import Route

from chiasm.fleet_key import make_fleet_key
from chiasm.launch.process import instance_process, proxy_process
from chiasm.models import resolve_folder
from chiasm.proxy import ProxyConfig, create_app
from chiasm.server import ServerConfig
from chiasm.server.app import app_of
from chiasm.server.context import ServerContext

_SECRETS = "/etc/chiasm/", "/run/secrets/"
"""Folders that exist in containers alone."""
_VARIABLES = {"$(POD_IP)": "127.0.0.1", "${CHIASM_MODEL:-demo}": "demo"}


def check(command: Sequence[str], folder: Path) -> Mapping[str, Any]:
    """Return the settings of a command without ``chiasm``, which would start with them. Raises ConfigurationError.

    Secrets are files in ``folder``, and variables have a value.
    """
    name, *arguments = [_here(one, folder) for one in command]
    settings: Mapping[str, Any] = import_module(f"chiasm.cli.{name}").parser().parse(arguments, {})
    if name == "proxy":
        proxy_process(settings)
    elif name == "instance":
        instance_process(resolve_folder(settings["model"]), settings["role"], settings)
    return settings


def _here(argument: str, folder: Path) -> str:
    for variable, value in _VARIABLES.items():
        argument = argument.replace(variable, value)
    flag, _, path = argument.partition("=")
    if not path.startswith(_SECRETS):
        return argument
    file = folder / Path(path).name
    if not file.exists():
        file.touch(0o600)
        file.write_text(make_fleet_key())
    return f"{flag}={file}"


@cache
def served_paths(command: str) -> frozenset[str]:
    """Return the paths that ``chiasm proxy`` or ``chiasm instance`` serves."""
    app = create_app(ProxyConfig()) if command == "proxy" else app_of(ServerContext("demo", ServerConfig()))
    return frozenset(route.path for route in app.routes if isinstance(route, Route))
