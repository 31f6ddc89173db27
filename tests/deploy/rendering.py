"""Renders the Helm chart, and the files of kustomize from it.

``python -m tests.deploy.rendering`` writes these files again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import helm_python
import yaml

KUBERNETES = Path(__file__).parents[2] / "deploy" / "kubernetes"
CHART = KUBERNETES / "chart"
NAME = "chiasm"
Objects = list[dict[str, Any]]
_APART = {"instances": {"pd": {"replicas": 0}, "prefill": {"replicas": 1}, "decode": {"replicas": 1}}}
_VLLM = {"engine": "vllm", "model": "Qwen/Qwen2.5-VL-7B-Instruct"}
LAYOUTS: dict[str, dict[str, Any]] = {
    "pd": {},
    "prefill-decode": _APART,
    "autoscaled": {"autoscaling": {"kind": "cpu"}},
    "vllm": _VLLM,
    "vllm-prefill-decode": {**_VLLM, **_APART},
}
"""Values that make the chart what an overlay is, by the overlay's name."""
_BASE = ("access", "network", "proxy")
_ROLES = ("encoder", "pd", "prefill", "decode")


def render(values: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Return what each template of the chart becomes, by the template's name."""
    with helm_python.Chart.load(str(CHART)) as chart:
        rendered = chart.render(dict(values or {}), name=NAME, namespace="default")
    return {Path(path).stem: text for path, text in rendered.items() if text.strip()}


def objects_of(texts: Mapping[str, str]) -> Objects:
    return [one for text in texts.values() for one in yaml.safe_load_all(text) if one]


@cache
def files() -> dict[Path, str]:
    """Return the files of kustomize that the chart becomes."""
    rendered = {name: render(values) for name, values in LAYOUTS.items()}
    overlays = Path("overlays")
    found = {Path("base") / f"{name}.yaml": rendered["pd"][name] for name in _BASE}
    found[overlays / "autoscaled" / "autoscaling.yaml"] = rendered.pop("autoscaled")["autoscaling"]
    for layout, texts in rendered.items():
        others = {name: text for name, text in texts.items() if name not in (*_BASE, "instances")}
        roles = {role: text for role in _ROLES if (text := _of_role(texts["instances"], role))}
        found |= {overlays / layout / f"{name}.yaml": text for name, text in {**roles, **others}.items()}
    return {path: text.strip() + "\n" for path, text in found.items()}


def _of_role(text: str, role: str) -> str:
    parts = [part for part in text.split("\n---\n") if f"app.kubernetes.io/component: {role}\n" in part]
    return "\n---\n".join(parts).removeprefix("---\n")


def kustomized(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a kustomization that has nothing but resources, and patches that remove a field."""
    told = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert told.keys() <= {"apiVersion", "kind", "resources", "patches"}, (
        f"{folder} has fields that nothing here understands"
    )
    for resource in told["resources"]:
        path = folder / resource
        for one in kustomized(path) if path.is_dir() else objects_of({"": path.read_text()}):
            for patch in told.get("patches", ()):
                if patch["target"] == {"kind": one["kind"], "name": one["metadata"]["name"]}:
                    _remove(one, patch["patch"])
            yield one


def _remove(one: dict[str, Any], patch: str) -> None:
    for change in yaml.safe_load(patch):
        assert change == {"op": "remove", "path": change["path"]}
        *folders, last = change["path"].strip("/").split("/")
        for folder in folders:
            one = one[folder]
        del one[last]


if __name__ == "__main__":
    for path, text in files().items():
        (KUBERNETES / path).write_text(text)
