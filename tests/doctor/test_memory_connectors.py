"""Real deployments whose embeddings go from memory to memory: doctor proves that they arrive, and finds those that can't."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from chiasm.ec_transfer import FROM_MEMORY
from chiasm.fleet_key import make_fleet_key
from chiasm.launch import Deployment, DeploymentConfig, RoleConfig
from chiasm.wire import Role
from tests.doctor.nixl import HAS_NIXL
from tests.doctor.test_deployments import SETTINGS, doctor, of
from tests.fleet import FORKS

CONNECTORS = [name for name in FROM_MEMORY if HAS_NIXL or name != "NixlConnector"]


@dataclass(frozen=True)
class Services:
    """An encoder and a PD for each connector, all with one fleet key."""

    deployments: dict[str, Deployment]
    key: tuple[str, str]
    """The option with the key."""


@pytest.fixture(scope="module")
def services(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    key = tmp_path_factory.mktemp("keys") / "fleet.key"
    key.write_text(make_fleet_key())
    key.chmod(0o600)
    roles = {role: RoleConfig() for role in (Role.ENCODER, Role.PD)}
    with ExitStack() as stack:
        deployments = {}
        for name in CONNECTORS:
            config = DeploymentConfig(
                str(checkpoint),
                roles,
                connector=name,
                ec_max_bytes=16 << 20,
                ec_receive_bytes=16 << 20,
                settings=SETTINGS,
                fleet_key_file=key,
            )
            deployments[name] = stack.enter_context(Deployment(config, forks=FORKS))
        for one in deployments.values():
            one.wait_ready()
        yield Services(deployments, ("--fleet-key-file", str(key)))


@pytest.mark.parametrize("connector", FROM_MEMORY)
def test_an_embedding_travels(services: Services, connector: str) -> None:
    if connector not in CONNECTORS:
        pytest.skip("NIXL is not installed")
    code, findings = doctor(services.deployments[connector].local_url, *services.key)
    assert code == 0, findings
    (travels,) = of(findings, "embedding travels")
    assert travels["verdict"] == "ok", travels
    assert travels["says"].endswith("encoded once, loaded, not encoded again")
    (store,) = of(findings, "EC store")
    assert store["verdict"] == "ok", store
    assert f"move embeddings by {connector} from 127.0.0.1:" in store["says"]
    assert [one["verdict"] for one in of(findings, "through the proxy")] == ["ok"], findings


def test_the_default_is_one_of_them(checkpoint: Path) -> None:
    assert DeploymentConfig(str(checkpoint)).ec_connector in CONNECTORS


def test_an_embedding_does_not_travel_to_another_connector(services: Services) -> None:
    (encoder,) = services.deployments["SharedMemoryConnector"].urls(Role.ENCODER)
    (pd,) = services.deployments["TcpConnector"].urls(Role.PD)
    code, findings = doctor("--encoder", encoder, "--pd", pd, "--timeout-seconds", "8", *services.key)
    assert code == 1
    (store,) = of(findings, "EC store")
    assert store["verdict"] == "problem"
    assert f"SharedMemoryConnector at encoder {encoder}" in store["says"]
    (travels,) = of(findings, "embedding travels")
    assert travels["verdict"] == "problem"
    assert "asked about it, answered HTTP 503" in travels["says"]
    assert "where the encoder keeps embeddings" in travels["do"]
