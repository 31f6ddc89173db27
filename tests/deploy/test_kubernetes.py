"""The Helm chart and the kustomizations: valid for Kubernetes, and true of the code that they start."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2 as httpx
import kubernetes_validate
import pytest
import yaml

from chiasm.launch.process import proxy_process
from chiasm.launch.scaling import STEP_SECONDS
from chiasm.proxy import ProxyConfig, create_app
from chiasm.proxy.discovery.endpoint_slices import Endpoint, EndpointSlice, Metadata, Port, Reading, instances_of
from chiasm.proxy.encoder_demand import DESIRED_METRIC
from chiasm.wire import Role
from tests.deploy.commands import check, served_paths, settings_of

helm_python = pytest.importorskip("helm_python", reason="helm-python-sdk has no wheel for Linux on arm64")

from tests.deploy.rendering import CHART, KUBERNETES, LAYOUTS, Objects, files, kustomized, objects_of, render  # noqa: E402

VERSIONS = ("1.28", "1.32", "1.37")
_EVERYTHING = {
    # Names that YAML would take for something else, and numbers that Helm would write as powers of ten.
    "fleetKeySecret": "0777",
    "apiKeySecret": "1e3",
    "adminKeySecret": "true",
    "hubTokenSecret": "null",
    "cacheClaim": "0",
    "imagePullSecrets": ["123"],
    "proxy": {
        "otlpTracesEndpoint": "http://collector:4318",
        "tlsSecret": "no",
        "memoryMi": 1 << 20,
        "args": ["--access-log=all"],
        "service": {"type": "LoadBalancer", "annotations": {"a": "b"}},
    },
    "instances": {
        "encoder": {
            "gpus": 1,
            "surge": 0,
            "nodeSelector": {"gpu": "small"},
            "args": ["--device=cuda"],
            "arenaMi": 1 << 20,
            "sharedMemoryMi": 2 << 20,
        },
        "pd": {"gpus": 1, "tolerations": [{"key": "gpu", "operator": "Exists"}]},
    },
    "networkPolicy": {
        "clients": [{"namespaceSelector": {}}],
        "scrapers": [{"namespaceSelector": {"matchLabels": {"name": "monitoring"}}}],
        "allowHub": False,
        "instanceEgress": [{"ports": [{"port": 6379}]}],
        "proxyEgress": [{"ports": [{"port": 443}, {"port": 6443}]}],
    },
}
_EVERYTHING_VLLM = {
    **_EVERYTHING,
    "engine": "vllm",
    "model": "/models/Qwen2.5-VL-72B",
    "modelVolume": {"persistentVolumeClaim": {"claimName": "models", "readOnly": True}},
    "instances": {
        "encoder": {"replicas": 1, "surge": 0, "loadSeconds": 3600},
        "pd": {"gpus": 4, "memoryMi": 65536, "args": ["--max-num-seqs=64"]},
    },
    "instanceArgs": ["--max-model-len=32768"],
    "instanceEnv": {"VLLM_LOGGING_LEVEL": "DEBUG"},
    "vllm": {"withoutTower": True, "embeddingsClaim": "embeddings"},
    "autoscaling": {"kind": "keda", "prometheusUrl": "http://prometheus:9090"},
}
_MORE = {
    "everything": _EVERYTHING,
    "everything in vLLM": _EVERYTHING_VLLM,
    "vLLM from a folder of the node": {
        **LAYOUTS["vllm-prefill-decode"],
        "model": "/models/qwen",
        "modelVolume": {"hostPath": {"path": "/srv/models", "type": "Directory"}},
        "vllm": {"withoutTower": True},
        "autoscaling": {"kind": "cpu"},
    },
    "by an external metric": {"autoscaling": {"kind": "external"}},
}
CHARTS = {name: objects_of(render(values)) for name, values in {**LAYOUTS, **_MORE}.items()}

OVERLAYS = {folder.name: list(kustomized(folder)) for folder in sorted((KUBERNETES / "overlays").iterdir())}
ALL = {**CHARTS, **{f"overlay {name}": objects for name, objects in OVERLAYS.items()}}
every_set = pytest.mark.parametrize("objects", ALL.values(), ids=ALL.keys())


def _of_kind(objects: Objects, kind: str) -> Objects:
    return [one for one in objects if one["kind"] == kind]


def _containers(objects: Objects) -> Objects:
    return [one["spec"]["template"]["spec"]["containers"][0] for one in _of_kind(objects, "Deployment")]


def _selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    matches = selector.get("matchLabels", {}).items() <= labels.items()
    return matches and all(one["key"] in labels for one in selector.get("matchExpressions", ()))


# ---- Kubernetes takes it ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_takes_it(version: str) -> None:
    different = {json.dumps(one): one for objects in CHARTS.values() for one in objects}
    for one in different.values():
        if one["apiVersion"] != "keda.sh/v1alpha1":  # which isn't of Kubernetes
            kubernetes_validate.validate(one, version, strict=True)


def test_an_unknown_field_would_be_found() -> None:
    wrong = copy.deepcopy(_of_kind(CHARTS["pd"], "Deployment")[0])
    wrong["spec"]["template"]["spec"]["containers"][0]["livenessProbe"]["periodSecond"] = 3
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[0], strict=True)


@every_set
def test_no_two_objects_have_one_name(objects: Objects) -> None:
    names = [(one["kind"], one["metadata"]["name"]) for one in objects]
    assert len(set(names)) == len(names)


def test_helm_finds_nothing_wrong() -> None:
    assert [one for one in helm_python.lint(str(CHART))["messages"] if one["severity"] in ("warning", "error")] == []


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"instances": {"pd": {"replicas": 0}}}, "Nothing answers"),
        ({"instances": {"prefill": {"replicas": 1}, "decode": {"replicas": 1}}}, "set instances.pd.replicas to 0"),
        ({"instances": {"prefill": {"replicas": 1}}}, "set instances.pd.replicas to 0"),
        (
            {"instances": {"encoder": {"replicas": 0}}, "autoscaling": {"kind": "cpu"}},
            "give instances.encoder replicas",
        ),
        ({"autoscaling": {"kind": "cpu", "min": 5}}, "autoscaling.max is 4, less than autoscaling.min"),
        ({"autoscaling": {"kind": "keda"}}, "autoscaling.prometheusUrl is needed"),
        ({"autoscaling": {"kind": "external", "metric": {"name": ""}}}, "name"),
        ({"apiKeySecret": "keys", "autoscaling": {"kind": "external"}}, "kind external needs /metrics"),
        ({"instances": {"pd": {"replica": 2}}}, "replica"),
        ({"modle": "demo"}, "modle"),
        ({"engine": "vllm"}, "vLLM needs a model"),
        ({**LAYOUTS["vllm"], "instances": {"pd": {"gpus": 0}}}, "instances.pd.gpus must be 1 or more"),
        ({"instances": {"pd": {"gpus": 2}}}, "several GPUs needs engine: vllm"),
        ({"vllm": {"embeddingsClaim": "embeddings"}}, "need engine: vllm"),
        (
            {"apiKeySecret": "keys", "autoscaling": {"kind": "keda", "prometheusUrl": "http://prometheus"}},
            "set adminKeySecret and give Prometheus the key",
        ),
        ({"proxy": {"args": ["--ssl-certfile=/tls.crt"]}}, "set proxy.tlsSecret"),
    ],
)
def test_wrong_values_are_refused_by_name(values: dict[str, Any], said: str) -> None:
    with pytest.raises(helm_python.HelmError, match=said):
        render(values)


def test_an_external_metric_is_the_one_of_proxies_and_says_the_number_of_encoders_itself() -> None:
    objects = CHARTS["by an external metric"]
    (scaler,) = _of_kind(objects, "HorizontalPodAutoscaler")
    (source,) = scaler["spec"]["metrics"]
    assert source["external"] == {
        "metric": {"name": DESIRED_METRIC, "selector": {"matchLabels": {"role": Role.ENCODER.value}}},
        "target": {"type": "AverageValue", "averageValue": "1"},
    }
    assert scaler["spec"]["scaleTargetRef"]["name"] in {
        one["metadata"]["name"] for one in _of_kind(objects, "Deployment")
    }


def test_keda_is_asked_with_the_query_that_is_given() -> None:
    values = {"autoscaling": {"kind": "keda", "prometheusUrl": "http://prometheus:9090", "query": "sum(wanted)"}}
    (scaled,) = _of_kind(objects_of(render(values)), "ScaledObject")
    assert scaled["spec"]["scaleTargetRef"]["name"] in {
        one["metadata"]["name"] for one in _of_kind(CHARTS["pd"], "Deployment")
    }
    assert scaled["spec"]["triggers"][0]["metadata"]["query"] == "sum(wanted)"


@pytest.mark.parametrize(
    ("values", "status"),
    [
        ({}, 200),
        ({"apiKeySecret": "keys", "proxy": {"openMetrics": True}}, 200),
        ({"apiKeySecret": "keys", "adminKeySecret": "admin"}, 401),  # without the key, which Prometheus is given
    ],
)
async def test_prometheus_may_read_what_keda_asks_it_for(values: dict[str, Any], status: int, tmp_path: Path) -> None:
    keda = {"kind": "keda", "prometheusUrl": "http://prometheus:9090"}
    objects = objects_of(render({**values, "autoscaling": keda}))
    (proxy,) = [one for one in _containers(objects) if one["name"] == "proxy"]
    config = proxy_process(check(proxy["args"], tmp_path)).proxy
    app = create_app(replace(config, discover=()))  # which works in a pod alone
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app, client=("10.1.2.3", 1))) as session:
        assert (await session.get("http://proxy/metrics")).status_code == status


@pytest.mark.parametrize("replicas", [2, 3])
def test_all_proxies_together_keep_the_limits_of_keys(replicas: int, tmp_path: Path) -> None:
    objects = objects_of(render({"apiKeySecret": "keys", "proxy": {"replicas": replicas}}))
    (proxy,) = [one for one in _containers(objects) if one["name"] == "proxy"]
    assert proxy_process(check(proxy["args"], tmp_path)).proxy.proxies == replicas


def test_the_calm_while_is_counted_once_by_kubernetes_with_cpu_and_otherwise_by_the_proxy() -> None:
    wanted = {"prometheusUrl": "http://prometheus:9090", "calmSeconds": 200}
    (keda,) = _of_kind(objects_of(render({"autoscaling": {"kind": "keda"} | wanted})), "ScaledObject")
    behavior = keda["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert behavior["scaleDown"]["stabilizationWindowSeconds"] == STEP_SECONDS < ProxyConfig.scale_down_seconds
    (external,) = _of_kind(
        objects_of(render({"autoscaling": {"kind": "external"} | wanted})), "HorizontalPodAutoscaler"
    )
    assert external["spec"]["behavior"]["scaleDown"] == behavior["scaleDown"]
    (cpu,) = _of_kind(objects_of(render({"autoscaling": {"kind": "cpu"} | wanted})), "HorizontalPodAutoscaler")
    assert cpu["spec"]["behavior"]["scaleDown"]["stabilizationWindowSeconds"] == 200


# ---- one source ------------------------------------------------------------------------------------------------------


def test_the_files_of_kustomize_are_what_the_chart_renders() -> None:
    written = {path: (KUBERNETES / path).read_text() for path in files()}
    assert written == files(), "run: python -m tests.deploy.rendering"


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_overlay_has_what_the_chart_has(name: str) -> None:
    def by_name(objects: Objects) -> dict[tuple[str, str], Any]:
        return {(one["kind"], one["metadata"]["name"]): one for one in objects}

    assert by_name(OVERLAYS[name]) == by_name(CHARTS[name])


@pytest.mark.parametrize("name", LAYOUTS)
def test_kustomize_builds_what_these_tests_read(name: str) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    built = subprocess.run([kubectl, "kustomize", str(KUBERNETES / "overlays" / name)], capture_output=True, check=True)

    def in_order(objects: Objects) -> list[Any]:
        return sorted(objects, key=lambda one: (one["kind"], one["metadata"]["name"]))

    assert in_order(list(yaml.safe_load_all(built.stdout))) == in_order(OVERLAYS[name])


# ---- chiasm understands it -------------------------------------------------------------------------------------------


@every_set
def test_containers_start_with_settings_that_chiasm_takes(objects: Objects, tmp_path: Path) -> None:
    for container in _containers(objects):
        settings = settings_of(container, tmp_path)
        ports = {one["name"]: one["containerPort"] for one in container["ports"]}
        told = {"http": settings["port"], "embeddings": settings.get("ec_port"), "kv": settings.get("kv_port")}
        assert ports == {name: port for name, port in told.items() if port is not None}


@every_set
def test_files_that_options_name_are_mounted_secrets(objects: Objects) -> None:
    for one in _of_kind(objects, "Deployment"):
        pod = one["spec"]["template"]["spec"]
        container = pod["containers"][0]
        mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        secret = {volume["name"] for volume in pod["volumes"] if volume.get("secret", {}).get("defaultMode") == 0o440}
        assert {volume["name"] for volume in pod["volumes"]} == set(mounted.values())
        command = [*container["args"], *container["lifecycle"]["preStop"]["exec"]["command"]]
        named = re.findall(r"file=(\S+)", "\n".join(command))
        assert named
        assert {mounted[str(Path(path).parent)] for path in named} <= secret


@every_set
def test_probes_ask_paths_that_are_served(objects: Objects) -> None:
    for container in _containers(objects):
        probes = {kind: container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")}
        assert {probe["port"] for probe in probes.values()} == {"http"}
        assert {probe["path"] for probe in probes.values()} <= served_paths(container["args"][0])
        # A process that isn't ready, or a proxy without instances, is not restarted for it.
        assert probes["liveness"]["path"] == "/livez"
        assert probes["readiness"]["path"] == "/readyz"


@every_set
def test_probes_and_services_speak_https_exactly_where_the_server_does(objects: Objects, tmp_path: Path) -> None:
    for container in _containers(objects):
        scheme = "HTTP" if settings_of(container, tmp_path).get("ssl_certfile") is None else "HTTPS"
        probes = [container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")]
        assert {probe.get("scheme", "HTTP") for probe in probes} == {scheme}
        if container["name"] == "proxy":
            (service,) = [one for one in _of_kind(objects, "Service") if one["metadata"]["name"] == "chiasm-proxy"]
            assert [port["name"] for port in service["spec"]["ports"]] == [scheme.lower()]


def test_some_charts_have_a_certificate_and_some_have_none() -> None:
    proxies = [one for objects in CHARTS.values() for one in _containers(objects) if one["name"] == "proxy"]
    assert {any("--ssl-keyfile" in one for one in container["args"]) for container in proxies} == {True, False}


@every_set
def test_instances_are_drained_before_they_are_ended(objects: Objects, tmp_path: Path) -> None:
    for one in _of_kind(objects, "Deployment"):
        pod = one["spec"]["template"]["spec"]
        container = pod["containers"][0]
        command = container["lifecycle"]["preStop"]["exec"]["command"]
        settings = settings_of(container, tmp_path)
        if container["name"] == "proxy":
            left = float(command[-1]) + settings["shutdown_timeout_seconds"]
        else:
            assert command[0] == "chiasm"
            drain = check(command[1:], tmp_path)
            assert (drain["url"], drain["wait"]) == (f"http://127.0.0.1:{settings['port']}", True)
            assert drain["timeout_seconds"] > settings["deadline_seconds"]
            left = drain["timeout_seconds"]
        assert pod["terminationGracePeriodSeconds"] > left


# ---- objects fit each other ------------------------------------------------------------------------------------------


@every_set
def test_services_and_budgets_select_the_pods_of_one_deployment(objects: Objects) -> None:
    pods = {
        one["metadata"]["name"]: one["spec"]["template"]["metadata"]["labels"]
        for one in _of_kind(objects, "Deployment")
    }
    for kind in ("Service", "PodDisruptionBudget"):
        selected = {}
        for one in _of_kind(objects, kind):
            selector = (
                one["spec"]["selector"] if kind == "PodDisruptionBudget" else {"matchLabels": one["spec"]["selector"]}
            )
            selected[one["metadata"]["name"]] = [name for name, labels in pods.items() if _selects(selector, labels)]
        assert selected == {name: [name] for name in pods}
    for one in _of_kind(objects, "Deployment"):
        assert _selects(one["spec"]["selector"], pods[one["metadata"]["name"]])


@every_set
def test_the_proxy_discovers_the_services_of_instances_and_their_roles(objects: Objects) -> None:
    (argument,) = [one for one in _containers(objects)[0]["args"] + _all_args(objects) if "--discover=" in one][:1]
    *equal, exists = argument.partition("=k8s:")[2].split(",")
    wanted = dict(one.split("=") for one in equal)
    found = {}
    for service in _of_kind(objects, "Service"):
        labels = service["metadata"]["labels"]
        if wanted.items() <= labels.items() and exists in labels:
            port = service["spec"]["ports"][0]
            slice_ = EndpointSlice(
                Metadata(labels=labels), endpoints=[Endpoint(["10.0.0.5"])], ports=[Port(port["name"], port["port"])]
            )
            (instance,) = instances_of([slice_], Reading())
            found[labels["app.kubernetes.io/component"]] = instance.role
    instances = {one["name"] for one in _containers(objects)} - {"proxy"}
    assert found == {name: Role(name) for name in instances}


def _all_args(objects: Objects) -> list[str]:
    return [argument for container in _containers(objects) for argument in container["args"]]


@every_set
def test_the_proxy_may_watch_endpoint_slices_and_nobody_may_do_more(objects: Objects) -> None:
    (role,), (binding,) = _of_kind(objects, "Role"), _of_kind(objects, "RoleBinding")
    assert role["rules"] == [
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]}
    ]
    assert not _of_kind(objects, "ClusterRole")
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    holders = {one["name"] for one in binding["subjects"]}
    accounts = {one["metadata"]["name"] for one in _of_kind(objects, "ServiceAccount")}
    for one in _of_kind(objects, "Deployment"):
        pod = one["spec"]["template"]["spec"]
        assert pod["serviceAccountName"] in accounts
        assert (pod["serviceAccountName"] in holders) is pod["automountServiceAccountToken"]
        assert pod["automountServiceAccountToken"] is (pod["containers"][0]["name"] == "proxy")


@every_set
def test_pods_have_no_more_rights_than_they_need(objects: Objects) -> None:
    for one in _of_kind(objects, "Deployment"):
        pod = one["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["containers"][0]["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


@every_set
def test_only_the_fleet_reaches_instances_and_only_at_ports_that_they_have(objects: Objects) -> None:
    policies = {one["metadata"]["name"]: one["spec"] for one in _of_kind(objects, "NetworkPolicy")}
    pods = [one["spec"]["template"]["metadata"]["labels"] for one in _of_kind(objects, "Deployment")]
    policy = policies["chiasm-instances"]
    instances = [labels for labels in pods if labels["app.kubernetes.io/component"] != "proxy"]
    assert [labels for labels in pods if _selects(policy["podSelector"], labels)] == instances
    fleet, *others = policy["ingress"]
    assert all(_selects(fleet["from"][0]["podSelector"], labels) for labels in pods)
    assert all(one["from"] and one["ports"] == [{"port": "http"}] for one in others)
    named = {port["name"] for container in _containers(objects) for port in container["ports"]}
    assert named <= {port["port"] for port in fleet["ports"]}
    assert [labels for labels in pods if _selects(policies["chiasm-proxy"]["podSelector"], labels)] == [
        labels for labels in pods if labels not in instances
    ]


def _egress(**values: Any) -> dict[str, list[Any] | None]:
    """Return what pods may reach by the name of their policy; None: everything."""
    policies = _of_kind(objects_of(render(values)), "NetworkPolicy")
    return {one["metadata"]["name"]: one["spec"].get("egress") for one in policies}


@pytest.mark.parametrize(
    ("endpoint", "port"),
    [
        ("http://collector.monitoring:4318/v1/traces", 4318),
        ("https://collector", 443),
        ("http://collector/v1/traces", 80),
        ("http://[fd00::1]:4318", 4318),
    ],
)
def test_a_proxy_that_may_not_reach_everything_reaches_the_collector_of_its_traces(
    endpoint: str, port: int, tmp_path: Path
) -> None:
    rule = {"ports": [{"port": 6443}]}
    values = {"proxy": {"otlpTracesEndpoint": endpoint}, "networkPolicy": {"proxyEgress": [rule]}}
    instances = _egress()["chiasm-instances"]
    assert instances
    fleet_and_dns = instances[:2]
    collector = {"ports": [{"port": port, "protocol": "TCP"}]}
    assert _egress(**values)["chiasm-proxy"] == [*fleet_and_dns, collector, rule]
    assert _egress(networkPolicy={"proxyEgress": [rule]})["chiasm-proxy"] == [*fleet_and_dns, rule]
    assert _egress(proxy={"otlpTracesEndpoint": endpoint})["chiasm-proxy"] is None
    proxy = next(one for one in _containers(objects_of(render(values))) if one["name"] == "proxy")
    assert check(proxy["args"], tmp_path)["otlp_traces_endpoint"] == endpoint


def test_a_policy_limits_what_pods_may_reach_exactly_if_it_has_rules_for_that() -> None:
    for objects in CHARTS.values():
        for one in _of_kind(objects, "NetworkPolicy"):
            assert ("Egress" in one["spec"]["policyTypes"]) is ("egress" in one["spec"])


def test_instances_reach_what_more_is_named() -> None:
    rule = {"ports": [{"port": 6379}]}
    before, after = _egress()["chiasm-instances"], _egress(networkPolicy={"instanceEgress": [rule]})["chiasm-instances"]
    assert before
    assert after == [*before, rule]


@every_set
def test_the_limit_of_memory_has_room_for_what_an_instance_keeps(objects: Objects, tmp_path: Path) -> None:
    for one in _of_kind(objects, "Deployment"):
        pod = one["spec"]["template"]["spec"]
        container = pod["containers"][0]
        settings = settings_of(container, tmp_path)
        kept = sum(settings.get(name, 0) for name in ("ec_max_bytes", "ec_receive_bytes", "kv_cache_bytes"))
        in_memory = [volume["emptyDir"] for volume in pod["volumes"] if "medium" in volume.get("emptyDir", {})]
        kept += sum(_bytes(volume["sizeLimit"]) for volume in in_memory)
        assert _bytes(container["resources"]["limits"]["memory"]) - kept >= 1 << 30


def _bytes(quantity: str) -> int:
    return int(quantity.removesuffix("Mi")) << 20
