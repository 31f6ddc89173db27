"""Real deployments: one that works, and one with instances that do not fit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from chiasm.fleet_key import make_fleet_key
from chiasm.launch import Deployment, DeploymentConfig, RoleConfig
from chiasm.wire import Role
from tests.cli.running import Running
from tests.fleet import FORKS

SETTINGS = {"kv_cache_bytes": 16 << 20, "max_model_len": 512, "dtype": "float32", "threads": 1}
SMALL = ("--kv-cache-bytes", "16MiB", "--max-model-len", "512", "--dtype", "float32", "--threads", "1")


def doctor(*arguments: str) -> tuple[int, list[dict[str, Any]]]:
    """Exit code and findings of `chiasm doctor --json`."""
    command = [sys.executable, "-m", "chiasm", "doctor", "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode in (0, 1), done.stderr
    report = json.loads(done.stdout)
    assert report["problems"] == bool(done.returncode)
    return done.returncode, report["findings"]


def of(findings: list[dict[str, Any]], check: str) -> list[dict[str, Any]]:
    return [one for one in findings if one["check"] == check]


@dataclass(frozen=True)
class Service:
    """A deployment with prefill and decode apart, and PDs beside it that don't fit its encoder."""

    deployment: Deployment
    store: Path
    pds: dict[str, str]
    """URLs, by what is wrong."""
    key: tuple[str, str]
    """The option with its fleet key."""


@pytest.fixture(scope="module")
def service(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """All processes start at the same time."""
    store = tmp_path_factory.mktemp("stores") / "store"
    roles = {role: RoleConfig() for role in (Role.ENCODER, Role.PREFILL, Role.DECODE)}
    key = store.with_name("fleet.key")
    key.write_text(make_fleet_key())
    key.chmod(0o600)
    config = DeploymentConfig(str(checkpoint), roles, shared_storage_path=store, settings=SETTINGS, fleet_key_file=key)
    beside = {
        "apart": ("--shared-storage-path", str(store.with_name("other"))),
        "bfloat16": ("--shared-storage-path", str(store), "--dtype", "bfloat16"),
    }
    with ExitStack() as stack:
        deployment = stack.enter_context(Deployment(config, forks=FORKS))
        started = {
            name: stack.enter_context(
                Running(
                    tmp_path_factory.mktemp(name),
                    *("instance", str(checkpoint), "--role", "pd", "--port", "0", *SMALL, *flags),
                )
            )
            for name, flags in beside.items()
        }
        deployment.wait_ready()
        urls = {name: one.wait_ready() for name, one in started.items()}
        yield Service(deployment, store, urls, ("--fleet-key-file", str(key)))


def test_a_working_deployment_has_no_problems(service: Service) -> None:
    code, findings = doctor(service.deployment.local_url, "--shared-storage-path", str(service.store), *service.key)
    assert code == 0, findings
    for check in (
        "proxy",
        "roles",
        "model",
        "EC store",
        "KV connector",
        "fleet key",
        "embedding travels",
        "KV travels",
        "through the proxy",
    ):
        assert [one["verdict"] for one in of(findings, check)] == ["ok"], of(findings, check)
    assert {one["verdict"] for one in of(findings, "storage folder")} == {"ok"}


def test_without_the_fleet_key_nothing_is_sent_from_instance_to_instance(service: Service) -> None:
    code, findings = doctor(service.deployment.local_url)
    assert code == 0, findings
    (key,) = of(findings, "fleet key")
    assert key["verdict"] == "skipped"
    assert "--fleet-key-file" in key["says"]
    assert not of(findings, "embedding travels")
    assert [one["verdict"] for one in of(findings, "through the proxy")] == ["ok"]


def test_instances_that_do_not_fit_are_found(service: Service) -> None:
    (encoder,) = service.deployment.urls(Role.ENCODER)
    pds = [argument for url in service.pds.values() for argument in ("--pd", url)]
    code, findings = doctor("--encoder", encoder, *pds, "--timeout-seconds", "5", *service.key)
    assert code == 1
    assert [one["verdict"] for one in of(findings, "fleet key")] == ["ok", "warning"]
    travels = {
        name: [one for one in of(findings, "embedding travels") if url in one["says"]]
        for name, url in service.pds.items()
    }
    assert [one["verdict"] for one in travels["apart"]] == ["problem"], travels
    assert [one["verdict"] for one in travels["bfloat16"]] == ["problem"], travels
    assert "No embedding came" in travels["apart"][0]["says"]
    assert "--shared-storage-path" in travels["apart"][0]["do"]
    (model,) = of(findings, "model")
    assert model["verdict"] == "problem"
    assert f"bfloat16 at pd {service.pds['bfloat16']}" in model["says"]
    assert [one["verdict"] for one in of(findings, "EC store")] == ["problem"]


def test_an_instance_is_not_taken_for_a_proxy_nor_a_proxy_for_an_instance(service: Service) -> None:
    code, (finding,) = doctor(service.pds["apart"])
    assert code == 1
    assert "is an instance (pd), not a proxy" in finding["says"]
    code, findings = doctor("--pd", service.deployment.local_url)
    assert code == 1
    assert "is a proxy, not an instance" in findings[0]["says"]
