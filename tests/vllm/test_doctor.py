"""``chiasm doctor`` and instances of vLLM."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from chiasm.launch import Deployment, DeploymentConfig, EngineKind, RoleConfig
from chiasm.wire import Role

from .processes import CHECKPOINT, MODEL, START_SECONDS, Server, chiasm, proxy

Launch = Callable[[Server], Server]


@dataclass(frozen=True)
class Examined:
    exit_code: int
    findings: list[dict[str, Any]]

    def verdicts(self, check: str) -> list[str]:
        return [one["verdict"] for one in self.findings if one["check"] == check]

    def said(self, check: str) -> str:
        return " ".join(one["says"] for one in self.findings if one["check"] == check)


def examine(*arguments: str) -> Examined:
    command = [sys.executable, "-m", "chiasm", "doctor", "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode in (0, 1), done.stderr
    return Examined(done.returncode, json.loads(done.stdout)["findings"])


def test_an_embedding_is_proven_to_travel_between_instances_of_vllm(encoder: Server, pd: Server) -> None:
    saved, loaded, own = encoder.count("saves"), pd.count("loads"), pd.count("misses")
    examined = examine("--encoder", encoder.url, "--pd", pd.url)
    assert examined.exit_code == 0, examined.findings
    assert examined.verdicts("embedding travels") == ["ok"], examined.findings
    assert examined.verdicts("model") == ["ok"]
    assert examined.verdicts("EC store") == ["ok"]
    assert "vllm 0.3" in examined.said("versions of instances")
    assert (encoder.count("saves"), pd.count("loads"), pd.count("misses")) == (saved + 1, loaded + 1, own)


def test_a_deployment_behind_its_proxy(launch: Launch, logs: Path, encoder: Server, pd: Server) -> None:
    front = launch(proxy(logs, "doctor-proxy", encoder, pd))
    front.wait_ready()
    examined = examine(front.url)
    assert examined.exit_code == 0, examined.findings
    assert examined.verdicts("embedding travels") == ["ok"]
    assert examined.verdicts("through the proxy") == ["ok"]


@pytest.fixture(scope="module")
def apart(store: Path) -> Iterator[Deployment]:
    """One prefill and one decode instance."""
    settings = {"dtype": "float32", "max_model_len": 2048, "max_num_seqs": 8}
    roles = {Role.PREFILL: RoleConfig(threads=1), Role.DECODE: RoleConfig(threads=1)}
    config = DeploymentConfig(MODEL, roles, engine=EngineKind.VLLM, shared_storage_path=store, settings=settings)
    with Deployment(config) as deployment:
        deployment.wait_ready(START_SECONDS)
        yield deployment


def test_kv_is_proven_to_travel_between_instances_of_vllm(encoder: Server, apart: Deployment) -> None:
    (prefill,), (decode,) = apart.urls(Role.PREFILL), apart.urls(Role.DECODE)
    examined = examine("--encoder", encoder.url, "--prefill", prefill, "--decode", decode)
    assert examined.exit_code == 0, examined.findings
    assert examined.verdicts("embedding travels") == ["ok"]
    assert examined.verdicts("KV travels") == ["ok"], examined.findings
    assert examined.verdicts("KV connector") == ["ok"]


def test_prefill_alone_is_no_deployment(encoder: Server, apart: Deployment) -> None:
    examined = examine("--encoder", encoder.url, "--prefill", *apart.urls(Role.PREFILL))
    assert examined.exit_code == 1
    assert "no decode instance" in examined.said("roles")
    assert examined.verdicts("KV travels") == []


@pytest.fixture(scope="module")
def encoder_of_another_dtype(launch: Launch, logs: Path, store: Path) -> Server:
    flags = ["--role", "encoder", "--shared-storage-path", str(store), "--served-model-name", MODEL]
    flags += ["--dtype", "bfloat16", "--threads", "1", "--max-model-len", "2048"]
    server = launch(chiasm(logs, "doctor-encoder", "instance", str(CHECKPOINT), *flags))
    server.wait_ready()
    return server


def test_an_instance_of_another_dtype_is_found(encoder_of_another_dtype: Server, pd: Server) -> None:
    examined = examine("--encoder", encoder_of_another_dtype.url, "--pd", pd.url)
    assert examined.exit_code == 1
    assert "problem" in examined.verdicts("model"), examined.findings
    assert encoder_of_another_dtype.url in examined.said("model")
    assert examined.verdicts("embedding travels") == ["problem"]


def test_a_plan_for_vllm_where_vllm_is_installed(tmp_path: Path) -> None:
    examined = examine(MODEL, "--engine", "vllm", "--port", "0", "--shared-storage-path", str(tmp_path / "embeddings"))
    assert examined.exit_code == 0, examined.findings
    assert examined.verdicts("vLLM") == ["ok"]
    assert examined.verdicts("memory") in (["ok"], ["warning"])
    assert examined.verdicts("storage folder") == ["ok"]
