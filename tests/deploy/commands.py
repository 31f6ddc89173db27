"""The commands of ``deploy/``, as chiasm's own parsers and configurations read them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from starlette.routing import Route

from chiasm.fleet_key import make_fleet_key
from chiasm.integrations.vllm.settings import Settings
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


def settings_of(container: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """Return the settings of a container, which runs chiasm or vLLM, as :func:`check` does."""
    if "command" not in container:
        return check(container["args"], folder)
    flags = vllm_flags(container)
    extra = json.loads(flags["--ec-transfer-config"])["ec_connector_extra_config"]
    settings = Settings.read(extra)
    variables = {one["name"]: one.get("value") for one in container["env"]}
    return {
        "port": int(flags["--port"]),
        "deadline_seconds": settings.wait_seconds,
        "ec_port": extra.get("port"),
        "ec_max_bytes": 0 if settings.uses_folder or "host" not in extra else settings.max_bytes,
        "ec_receive_bytes": extra.get("receive_bytes", 0),
        "kv_port": int(variables["VLLM_NIXL_SIDE_CHANNEL_PORT"] or 0) if "--kv-transfer-config" in flags else None,
    }


def vllm_flags(container: Mapping[str, Any]) -> dict[str, str]:
    """Return the flags of a container of vLLM, with ``""`` for one without a value. The last one of a name counts."""
    assert container["command"] == ["vllm"]
    serve, model, *flags = container["args"]
    assert serve == "serve"
    assert not model.startswith("-")
    assert all(flag.startswith("--") for flag in flags)
    return {name: value for name, _, value in (flag.partition("=") for flag in flags)}


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
    """Return the paths that ``chiasm proxy``, ``chiasm instance`` or ``vllm serve`` with the middleware serves."""
    if command == "serve":  # tests/integrations/vllm/test_middleware.py asks for them
        return frozenset({"/health", "/livez", "/readyz"})
    app = create_app(ProxyConfig()) if command == "proxy" else app_of(ServerContext("demo", ServerConfig()))
    return frozenset(route.path for route in app.routes if isinstance(route, Route))
