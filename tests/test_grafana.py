"""What the dashboard and alert rules in deploy/grafana ask for is exported; `integration` asks the pages of running fleets."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from chiasm.engine.base import Engine
from chiasm.proxy.fleet import Fleet
from chiasm.proxy.metrics import Metrics as ProxyMetrics
from chiasm.server.metrics import Metrics as InstanceMetrics
from chiasm.wire import Role
from tests.server.fake_engine import FakeLanguageEngine

ROOT = Path(__file__).parents[1]
DASHBOARD: Any = json.loads((ROOT / "deploy/grafana/dashboard.json").read_text())
ALERTS: Any = msgspec.yaml.decode((ROOT / "deploy/grafana/alerts.yaml").read_bytes())
DOCS = (ROOT / "docs/metrics.md").read_text() + (ROOT / "docs/proxy.md").read_text()
METRIC = re.compile(r"\bchiasm_\w+")
LABELS_OF = re.compile(r"(chiasm_\w+)\{([^}]*)\}")
BY = re.compile(r"by \(([^)]*)\)")
OF_SCRAPES = {"instance", "job", "le"}


def expressions() -> Iterator[tuple[str, str]]:
    """Yield the title and the text of each expression."""
    for panel in DASHBOARD["panels"]:
        yield from ((panel["title"], target["expr"]) for target in panel["targets"])
    for rule in ALERTS["groups"][0]["rules"]:
        yield rule["alert"], rule["expr"]


@dataclass
class Instance:
    """What the page of an instance is about."""

    model: str
    loaded_engine: Engine | None
    state: str = "ok"


@pytest.fixture(scope="module")
def exported() -> dict[str, set[str]]:
    """Labels by the name of a sample, of a proxy with an instance and of an instance."""
    fleet = Fleet()
    fleet.add("http://127.0.0.1:1", Role.PD)
    proxy, instance = ProxyMetrics(fleet), InstanceMetrics(Instance("tiny", FakeLanguageEngine(Role.PD)))
    found: dict[str, set[str]] = {}
    for registry in (proxy.registry, instance.registry):
        for family in registry.collect():
            suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"], "info": ["_info"]}
            for suffix in suffixes.get(family.type, [""]):
                labels = {name for sample in family.samples for name in sample.labels}
                found.setdefault(family.name + suffix, set()).update(labels)
        for collector in registry._collector_to_names:
            for name in registry._collector_to_names[collector]:
                if name in found:
                    found[name].update(getattr(collector, "_labelnames", ()))
    return found


@pytest.mark.parametrize(("title", "expression"), list(expressions()))
def test_expressions_ask_for_what_is_exported(title: str, expression: str, exported: dict[str, set[str]]) -> None:
    names = set(METRIC.findall(expression))
    assert names, title
    assert names <= set(exported)
    labels = {label for group in BY.findall(expression) for label in re.findall(r"\w+", group)}
    known = OF_SCRAPES.union(*(exported[name] for name in names))
    assert labels <= known
    for name, matchers in LABELS_OF.findall(expression):
        assert set(re.findall(r"(\w+)\s*(?:=|!=|=~)", matchers)) <= exported[name] | OF_SCRAPES


@pytest.mark.parametrize(("title", "expression"), list(expressions()))
def test_instances_are_counted_once_however_many_proxies_know_them(title: str, expression: str) -> None:
    is_count = re.search(r"(?:sum|count)(?: by \(role\))? \(chiasm_proxy_instance_healthy", expression) is not None
    assert not is_count or expression.endswith("== 0")


def test_an_alert_fires_when_no_proxy_can_be_scraped() -> None:
    assert (
        dict(expressions())["ChiasmNotReady"] == "(max(chiasm_proxy_ready) or vector(0)) == 0"
    )  # else it has no samples


def test_every_alert_has_an_expression_a_summary_and_a_row_in_the_docs() -> None:
    for rule in ALERTS["groups"][0]["rules"]:
        assert rule["annotations"]["summary"].endswith(".")
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert f"| `{rule['alert']}` |" in DOCS


def test_panels_have_places_of_their_own() -> None:
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in DASHBOARD["panels"]]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(places)


def test_what_is_exported_is_documented(exported: dict[str, set[str]]) -> None:
    named = set(METRIC.findall(DOCS))
    families = tuple(name for name in re.findall(r"`(chiasm_\w+_)\*`", DOCS))
    missing = {re.sub(r"_(bucket|sum|count)$", "", name) for name in exported if name.startswith("chiasm_")} - named
    assert {name for name in missing if not name.startswith(families)} == set()
