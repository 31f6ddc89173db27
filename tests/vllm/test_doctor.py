"""``chiasm doctor`` and instances of vLLM."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .conftest import Launch
from .fleet import front
from .processes import MODEL, START_SECONDS, Server, chiasm_instance


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
    done = subprocess.run(command, capture_output=True, text=True, timeout=START_SECONDS, check=False)
    assert done.returncode in (0, 1), done.stderr
    return Examined(done.returncode, json.loads(done.stdout)["findings"])


def test_an_embedding_passes_between_instances_of_vllm(encoder: Server, pd: Server) -> None:
    saved, loaded, own = encoder.count("saves"), pd.count("loads"), pd.count("misses")
    examined = examine("--encoder", encoder.url, "--pd", pd.url)
    assert examined.exit_code == 0, examined.findings
    assert examined.verdicts("embedding travels") == ["ok"], examined.findings
    assert examined.verdicts("model") == ["ok"]
    assert examined.verdicts("EC store") == ["ok"]
    assert "vllm 0.3" in examined.said("versions of instances")
    encoder.until(lambda: encoder.count("saves") == saved + 1)
    pd.until(lambda: pd.count("loads") == loaded + 1)
    assert pd.count("misses") == own


def test_a_deployment_behind_its_proxy(launch: Launch, logs: Path, encoder: Server, pd: Server) -> None:
    server = launch(front(logs, "doctor-proxy", encoder=[encoder], pd=[pd]))
    server.wait_ready()
    examined = examine(server.url)
    assert examined.exit_code == 0, examined.findings
    assert examined.verdicts("embedding travels") == ["ok"]
    assert examined.verdicts("through the proxy") == ["ok"]


def test_kv_passes_between_instances_of_vllm(encoder: Server, prefill_decode: tuple[Server, Server]) -> None:
    prefill, decode = prefill_decode
    examined = examine("--encoder", encoder.url, "--prefill", prefill.url, "--decode", decode.url)
    assert examined.exit_code == 0, examined.findings
    assert examined.verdicts("embedding travels") == ["ok"]
    assert examined.verdicts("KV travels") == ["ok"], examined.findings
    assert examined.verdicts("KV connector") == ["ok"]


def test_a_prefill_instance_needs_a_decode_instance(encoder: Server, prefill_decode: tuple[Server, Server]) -> None:
    examined = examine("--encoder", encoder.url, "--prefill", prefill_decode[0].url)
    assert examined.exit_code == 1
    assert "no decode instance" in examined.said("roles")
    assert examined.verdicts("KV travels") == []


@pytest.fixture(scope="module")
def encoder_of_another_dtype(launch: Launch, logs: Path, store: Path) -> Server:
    server = launch(chiasm_instance(logs, "encoder", store, "bfloat16"))
    server.wait_ready()
    return server


def test_an_instance_of_another_dtype_is_found(encoder_of_another_dtype: Server, pd: Server) -> None:
    examined = examine("--encoder", encoder_of_another_dtype.url, "--pd", pd.url)
    assert examined.exit_code == 1
    assert "problem" in examined.verdicts("model"), examined.findings
    assert encoder_of_another_dtype.url in examined.said("model")
    assert examined.verdicts("embedding travels") == ["problem"]


def test_a_plan_for_vllm_in_an_environment_with_vllm(tmp_path: Path) -> None:
    examined = examine(MODEL, "--engine", "vllm", "--port", "0", "--shared-storage-path", str(tmp_path / "embeddings"))
    assert examined.exit_code == 0, examined.findings
    assert examined.verdicts("vLLM") == ["ok"]
    assert examined.verdicts("memory") in (["ok"], ["warning"])
    assert examined.verdicts("storage folder") == ["ok"]
