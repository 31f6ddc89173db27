"""The commands for several machines that the guides show. In tests/vllm, vLLM's own parser reads what is for it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from chiasm.integrations.vllm.settings import Settings
from chiasm.wire import Role
from tests.deploy.commands import check
from tests.deploy.guides import Command, commands_of

_ROLES = {
    "Two machines": {Role.ENCODER: "a", Role.PD: "b"},
    "Three machines": {Role.ENCODER: "a", Role.PREFILL: "b", Role.DECODE: "c"},
}
"""The machine of each role."""


@pytest.fixture(params=_ROLES)
def machines(request: pytest.FixtureRequest) -> str:
    """The heading of the guide."""
    return str(request.param)


def named(settings: Mapping[str, Any]) -> dict[Role, list[str]]:
    """Return the URLs of instances that a proxy or the doctor gets."""
    urls = {role: list(settings.get(role) or ()) for role in Role}
    return {role: found for role, found in urls.items() if found}


def test_the_built_in_engines_instances_are_what_the_proxy_and_the_doctor_are_told(
    machines: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = commands_of("connector.md", "### Several machines", f"#### {machines}", folder=tmp_path)
    monkeypatch.chdir(tmp_path)
    assert {command.name for command in commands} == {"chiasm"}
    checked = [(command.arguments[0], check(command.arguments, tmp_path)) for command in commands]
    instances = {Role(one["role"]): one for kind, one in checked if kind == "instance"}
    assert {role: one["host"] for role, one in instances.items()} == _ROLES[machines]
    urls = {role: [f"http://{one['host']}:{one['port']}"] for role, one in instances.items()}
    assert [(kind, named(one)) for kind, one in checked if kind != "instance"] == [("proxy", urls), ("doctor", urls)]
    assert {str(one["fleet_key_file"]) for _, one in checked} == {"fleet.key"}
    for role, one in instances.items():
        assert one.get("connector") == (None if role is Role.DECODE else "TcpConnector")
        assert one.get("ec_host") == (one["host"] if role is Role.ENCODER else None)
        assert one.get("kv_connector") == ("TcpConnector" if role in (Role.PREFILL, Role.DECODE) else None)
        assert one.get("kv_host") == (one["host"] if role is Role.PREFILL else None)


def test_vllms_instances_are_what_the_proxy_is_told(machines: str, tmp_path: Path) -> None:
    commands = commands_of("vllm.md", "## Several machines", f"### {machines}", folder=tmp_path)
    *instances, proxy = commands
    assert [command.name for command in commands] == ["vllm"] * len(instances) + ["chiasm"]
    assert len({command.fleet_key for command in commands}) == 1
    urls: dict[Role, list[str]] = {}
    for (role, machine), command in zip(_ROLES[machines].items(), instances, strict=True):
        flags = flags_of(command)
        urls[role] = [f"http://{machine}:{flags['--port']}"]
        settings = Settings.read(json.loads(flags["--ec-transfer-config"])["ec_connector_extra_config"])
        place = {"host": machine, "port": 8101} if role is Role.ENCODER else {}
        assert settings == Settings("TcpConnector", connector_extra_config=place)
        assert command.side_channel_host == (machine if role in (Role.PREFILL, Role.DECODE) else "")
    assert named(check(proxy.arguments, tmp_path)) == urls


def flags_of(command: Command) -> dict[str, str]:
    """Return the flags of ``vllm serve MODEL``, with ``""`` for one without a value."""
    serve, _, *words = command.arguments
    assert serve == "serve"
    flags: dict[str, str] = {}
    for word in words:
        if word.startswith("--"):
            flags[word] = ""
        else:
            flags[next(reversed(flags))] = word
    return flags
