"""What the chart starts with vLLM is what ``chiasm serve --engine vllm`` starts. In tests/vllm, vLLM's own parser reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from chiasm.integrations.vllm.settings import Settings
from chiasm.launch import DeploymentConfig, EngineKind, RoleConfig, vllm
from chiasm.launch.devices import Placement
from chiasm.launch.ports import HeldPort
from chiasm.launch.vllm import Installed, Site
from chiasm.wire import Role
from tests.deploy.commands import vllm_flags

pytest.importorskip("helm_python", reason="helm-python-sdk has no wheel for Linux on arm64")

from tests.deploy.rendering import LAYOUTS, Objects, objects_of, render

_WHOLE, _APART = (Role.ENCODER, Role.PD), (Role.ENCODER, Role.PREFILL, Role.DECODE)
_FOUND = Installed(Path("/usr/local/bin/vllm"), "0.33.0")
_OF_THE_PLACE = {"--host", "--port", "--served-model-name", "--disable-access-log-for-endpoints"}
"""Flags whose values are those of a pod, and not of a process among others."""
_ARENA_MI = 100
_CLAIM = {"vllm": {"embeddingsClaim": "shared", "embeddingsMi": _ARENA_MI}}


def _deployments(values: Mapping[str, Any]) -> dict[Role, Any]:
    """Return the specifications of the pods of each role."""
    deployments = [one for one in objects_of(render(values)) if one["kind"] == "Deployment"]
    pods = [one["spec"]["template"]["spec"] for one in deployments]
    return {Role(pod["containers"][0]["name"]): pod for pod in pods if pod["containers"][0]["name"] != "proxy"}


def _values(roles: tuple[Role, ...], **values: Any) -> dict[str, Any]:
    base = LAYOUTS["vllm" if roles is _WHOLE else "vllm-prefill-decode"]
    instances = {role: {**base.get("instances", {}).get(role, {}), "arenaMi": _ARENA_MI} for role in roles}
    return {**base, "instances": {**base.get("instances", {}), **instances}, **values}


def _flags_of_serve(command: list[str]) -> dict[str, str]:
    """Return the flags of the ``vllm serve`` that a supervisor starts."""
    flags: dict[str, str] = {}
    for word in command[command.index("--") + 4 :]:
        if word.startswith("--"):
            name = word
            flags[name] = ""
        else:
            flags[name] = word
    return flags


def _read(flags: Mapping[str, str]) -> dict[str, Any]:
    """Return the flags with their values from JSON, but for those of the place."""
    return {
        name: json.loads(value) if value.startswith("{") else value
        for name, value in flags.items()
        if name not in _OF_THE_PLACE
    }


@pytest.fixture
def address() -> HeldPort:
    held = HeldPort("127.0.0.1")
    held.release()
    return held


@pytest.mark.parametrize(("gpus", "has_claim"), [(1, False), (4, False), (4, True)])
@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize(
    ("roles", "role"), [*((_WHOLE, role) for role in _WHOLE), *((_APART, role) for role in _APART)]
)
def test_an_instance_gets_the_flags_and_variables_of_serve(
    roles: tuple[Role, ...],
    role: Role,
    model_type: str,
    gpus: int,
    has_claim: bool,
    address: HeldPort,
    tmp_path: Path,
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    (tmp_path / "embeddings").mkdir()
    without_tower = {"withoutTower": model_type == "qwen2_5_vl"}
    values = _values(roles, vllm={**without_tower, **(_CLAIM["vllm"] if has_claim else {})}, deadlineSeconds=90)
    values["instances"][role] |= {"gpus": gpus, "cpus": 3}
    container = _deployments(values)[role]["containers"][0]

    folder = {"shared_storage_path": Path("/embeddings/chiasm")} if has_claim else {"connector": "TcpConnector"}
    place = {"host": "$(POD_IP)", "port": 8100} if not has_claim and role is Role.ENCODER else {}
    received = _ARENA_MI << 20 if role is not Role.ENCODER else None
    config = DeploymentConfig(
        str(tmp_path),
        {each: RoleConfig(threads=3) for each in roles},
        engine=EngineKind.VLLM,
        connector_extra_config=place,
        deadline_seconds=90,
        ec_receive_bytes=received,
        **folder,
    )
    placement = Placement(devices=tuple(map(str, range(gpus))))
    side_channel = address if role in (Role.PREFILL, Role.DECODE) else None
    site = Site(address, placement, Path("/embeddings/chiasm"), _ARENA_MI << 20, side_channel, None)
    command = vllm.instance_command(config, tmp_path, role, site, found=_FOUND, kv_bytes=1)
    expected = _read(_flags_of_serve(command))
    if not has_claim and role is not Role.ENCODER:  # it keeps nothing for others
        del expected["--ec-transfer-config"]["ec_connector_extra_config"]["max_bytes"]
    assert _read(vllm_flags(container)) == expected

    variables = vllm.instance_environment(config, role, site, found=_FOUND, environment={})
    of_pod = {one["name"] for one in container["env"]}
    # The name of a model is a folder by then for serve; GPUs are chosen by Kubernetes.
    of_serve = variables.keys() - {"HF_HUB_OFFLINE", "CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES"}
    of_pod -= {"POD_IP", "HOME", "CHIASM_FLEET_KEY"}
    assert of_pod | {"PYTHONHASHSEED"} == of_serve
    assert ("PYTHONHASHSEED" in of_pod) is (gpus > 1)
    assert {one["name"]: one.get("value") for one in container["env"]}["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize("roles", [_WHOLE, _APART])
@pytest.mark.parametrize("claim", [{}, _CLAIM])
def test_chiasms_connector_takes_its_settings(roles: tuple[Role, ...], claim: dict[str, Any]) -> None:
    for pod in _deployments(_values(roles, **claim)).values():
        flags = vllm_flags(pod["containers"][0])
        extra = json.loads(flags["--ec-transfer-config"])["ec_connector_extra_config"]
        settings = Settings.read(extra)
        assert settings.uses_folder is bool(claim)
        assert ("--distributed-executor-backend" in flags) is not bool(claim)


def test_the_health_checks_of_the_cluster_are_not_logged() -> None:
    for pod in _deployments(LAYOUTS["vllm"]).values():
        container = pod["containers"][0]
        quiet = vllm_flags(container)["--disable-access-log-for-endpoints"].split(",")
        asked = {container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness", "readiness")}
        assert asked | {"/health"} <= set(quiet)


@pytest.mark.parametrize("seconds", [1800, 1801])
def test_a_model_has_the_time_to_load_that_is_given(seconds: int) -> None:
    probe = _deployments(_values(_WHOLE, standard={"vllm": {"loadSeconds": seconds}}))[Role.PD]["containers"][0][
        "startupProbe"
    ]
    assert 0 <= probe["periodSeconds"] * probe["failureThreshold"] - seconds < probe["periodSeconds"]


def test_a_name_on_the_hub_is_loaded_from_there_and_a_folder_is_not() -> None:
    def offline(values: Mapping[str, Any]) -> set[bool]:
        pods = _deployments(values).values()
        return {"HF_HUB_OFFLINE" in {one["name"] for one in pod["containers"][0]["env"]} for pod in pods}

    volume = {"modelVolume": {"hostPath": {"path": "/srv"}}}
    folder = {**LAYOUTS["vllm"], "model": "/models/qwen", **volume}
    assert offline({**LAYOUTS["vllm"], "hubTokenSecret": "hub"}) == {False}
    assert offline(folder) == {True}
    for pod in _deployments(folder).values():
        container = pod["containers"][0]
        assert vllm_flags(container)["--served-model-name"] == "qwen"
        mounts = [mount for mount in container["volumeMounts"] if mount["mountPath"] == "/models"]
        assert mounts == [{"name": "models", "mountPath": "/models", "readOnly": True}]
        assert {"name": "models", "hostPath": {"path": "/srv"}} in pod["volumes"]


def test_each_instance_has_its_gpus_and_a_shared_memory_of_its_own() -> None:
    values = _values(_WHOLE, **_CLAIM)
    values["instances"][Role.PD] |= {"gpus": 2}
    pods = _deployments(values)
    for role, gpus in {Role.ENCODER: 1, Role.PD: 2}.items():
        container = pods[role]["containers"][0]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == gpus
        assert {"name": "shared-memory", "mountPath": "/dev/shm"} in container["volumeMounts"]
        assert {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": "1024Mi"}} in pods[role][
            "volumes"
        ]


def test_arguments_of_a_role_come_after_those_of_all() -> None:
    values = _values(_WHOLE, instanceArgs=["--max-num-seqs=8"], instanceEnv={"UCX_TLS": "tcp"})
    values["instances"][Role.PD]["args"] = ["--max-num-seqs=64"]
    pods = _deployments(values)
    seqs = {role: vllm_flags(pod["containers"][0])["--max-num-seqs"] for role, pod in pods.items()}
    assert seqs == {Role.ENCODER: "8", Role.PD: "64"}
    assert all({"name": "UCX_TLS", "value": "tcp"} in pod["containers"][0]["env"] for pod in pods.values())


def test_prefill_and_decode_reach_each_other_at_every_port() -> None:
    def policies(objects: Objects) -> dict[str, Any]:
        return {one["metadata"]["name"]: one["spec"] for one in objects if one["kind"] == "NetworkPolicy"}

    policy = policies(objects_of(render(LAYOUTS["vllm-prefill-decode"])))["chiasm-kv"]
    assert policy["ingress"] == [{"from": [{"podSelector": policy["podSelector"]}]}]
    assert policy["podSelector"]["matchLabels"] == {
        "app.kubernetes.io/name": "chiasm",
        "app.kubernetes.io/instance": "chiasm",
    }
    (component,) = policy["podSelector"]["matchExpressions"]
    assert set(component["values"]) == {"prefill", "decode"}
    assert "chiasm-kv" not in policies(objects_of(render(LAYOUTS["vllm"])))
    assert "chiasm-kv" not in policies(objects_of(render(LAYOUTS["prefill-decode"])))
