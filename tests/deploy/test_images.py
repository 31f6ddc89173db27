"""Dockerfiles and compose.yaml."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from chiasm.http.config import HttpConfig
from chiasm.http.listen import bind
from chiasm.http.serve import HttpServer
from chiasm.proxy import ProxyConfig, create_app
from chiasm.proxy.process import create_server
from tests.deploy.commands import check, served_paths
from tests.http.test_tls import GOOD, KEY

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted((ROOT / "deploy" / "docker").glob("Dockerfile*"))
HEALTHCHECK = ROOT / "deploy" / "docker" / "healthcheck.py"
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
_USER = "10001:10001"


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_hadolint_has_no_objection(file: Path) -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}")
    if hadolint is None:
        pytest.skip("hadolint has no wheel for this machine")
    done = subprocess.run([hadolint, "--strict-labels", str(file)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def _stages(file: Path) -> list[list[tuple[str, str]]]:
    """Return the instructions of each stage, in which lines that go on are joined."""
    text = re.sub(r"\\\n", " ", "\n".join(line for line in file.read_text().splitlines() if not line.startswith("#")))
    stages: list[list[tuple[str, str]]] = []
    for line in text.splitlines():
        name, _, rest = line.strip().partition(" ")
        if name == "FROM":
            stages.append([])
        if name and stages:
            stages[-1].append((name, rest.strip()))
    return stages


def _images(file: Path) -> list[dict[str, str]]:
    """Return the last instruction of each name, for the stages that are images of their own."""
    return [dict(stage) for stage in _stages(file) if any(name == "ENTRYPOINT" for name, _ in stage)]


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_images_run_as_a_user_and_ask_a_path_that_every_process_serves(file: Path) -> None:
    assert _images(file)
    for image in _images(file):
        assert image["USER"] == _USER
        assert image["ENTRYPOINT"] == '["chiasm"]'
        assert image["EXPOSE"] == "8000"
        _assert_is_health_check(json.loads(image["HEALTHCHECK"].partition("CMD ")[2]))


def _assert_is_health_check(command: list[str]) -> None:
    """Check that a command asks port 8000 for a path that every process serves."""
    *program, path = command
    assert program == ["python3", "/opt/healthcheck.py"]
    assert path in served_paths("proxy") & served_paths("instance")


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_images_have_the_health_check(file: Path) -> None:
    copied = [rest for stage in _stages(file) for name, rest in stage if name == "COPY"]
    assert f"{HEALTHCHECK.relative_to(ROOT)} /opt/healthcheck.py" in copied


async def _exit_code(server: HttpServer, path: str) -> int:
    """Return the exit code of the health check, run as in a container whose server is this one."""
    port = str(server.servers[0].sockets[0].getsockname()[1])
    process = await asyncio.create_subprocess_exec(sys.executable, "-I", HEALTHCHECK, path, port)
    return await process.wait()


@pytest.mark.parametrize("http", [HttpConfig(), HttpConfig(ssl_certfile=GOOD, ssl_keyfile=KEY)], ids=["http", "https"])
async def test_the_health_check_follows_the_server_to_https(http: HttpConfig) -> None:
    config = ProxyConfig(http=http)
    server = create_server(create_app(config), config)
    serving = asyncio.ensure_future(server.serve(sockets=[bind("127.0.0.1", 0)]))
    await server.ready.wait()
    codes = {path: await _exit_code(server, path) for path in ("/livez", "/readyz", "/nothing")}
    assert codes == {"/livez": 0, "/readyz": 1, "/nothing": 1}  # it has no instance
    server.stop()
    await serving


def test_nobody_at_the_port_is_not_healthy() -> None:
    with bind("127.0.0.1", 0, listening=False) as held:
        port = str(held.getsockname()[1])
        done = subprocess.run([sys.executable, "-I", HEALTHCHECK, "/livez", port], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_what_images_copy_is_there_and_is_not_ignored(file: Path) -> None:
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        source
        for stage in _stages(file)
        for name, rest in stage
        if name == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    }
    assert copied
    assert copied <= sent
    assert all((ROOT / source).exists() for source in sent)


@pytest.mark.parametrize("name", SERVICES)
def test_compose_starts_what_chiasm_understands(name: str, tmp_path: Path) -> None:
    settings = check(SERVICES[name]["command"], tmp_path)
    assert settings["port"] == 8000
    assert settings["shutdown_timeout_seconds"] < float(SERVICES[name]["stop_grace_period"].removesuffix("s"))


def test_compose_publishes_the_proxy_alone_and_on_loopback_alone() -> None:
    assert {name: service["ports"] for name, service in SERVICES.items() if "ports" in service} == {
        "proxy": ["127.0.0.1:8000:8000"]
    }


@pytest.mark.parametrize("name", SERVICES)
def test_compose_gives_no_more_than_is_needed(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["secrets"] == list(COMPOSE["secrets"])
    kind, *command = service["healthcheck"]["test"]
    assert kind == "CMD"
    _assert_is_health_check(command)


def test_the_proxy_of_compose_asks_the_services_that_there_are() -> None:
    asked = dict(re.findall(r"--(encoder|pd)=http://(\w+):8000", " ".join(SERVICES["proxy"]["command"])))
    roles = {name: f"--role={role}" in SERVICES[name]["command"] for role, name in asked.items()}
    assert roles == {"encoder": True, "pd": True}
