"""The names and labels in deploy/grafana are those on the pages of running fleets."""

from __future__ import annotations

import re
from collections import defaultdict

import httpx2 as httpx

from chiasm.prometheus import read_samples
from chiasm.wire import Role
from tests.test_grafana import BY, LABELS_OF, METRIC, OF_SCRAPES, expressions

from .conftest import Service, chat, sample_image

_SUFFIXES = {"histogram": ("_bucket", "_sum", "_count")}


def pages(service: Service, *roles: Role) -> list[str]:
    """Return the pages of the proxy and of all instances, after a request about an image."""
    assert service.post(chat("see", sample_image(31), "?", stream=True)).status_code == 200
    urls = [service.url, *(url for role in roles for url in service.deployment.urls(role))]
    return [httpx.get(f"{url}/metrics", timeout=60).text for url in urls]


def test_what_is_asked_for_is_exported_by_running_fleets(disaggregated: Service, epd: Service) -> None:
    found = pages(disaggregated, Role.ENCODER, Role.PD) + pages(epd, Role.ENCODER, Role.PREFILL, Role.DECODE)
    names: set[str] = set()
    labels: dict[str, set[str]] = defaultdict(set)
    for page in found:
        for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", page, re.MULTILINE):
            names |= {name + suffix for suffix in _SUFFIXES.get(kind, ("",))}
        for sample in read_samples(page):
            labels[sample.name] |= sample.labels.keys()
    for title, expression in expressions():
        asked = set(METRIC.findall(expression))
        assert asked <= names, title
        for name, matchers in LABELS_OF.findall(expression):
            if name in labels:  # what has labels and has not happened yet has no samples
                assert set(re.findall(r"(\w+)\s*(?:=|!=|=~)", matchers)) <= labels[name] | OF_SCRAPES, title
        if asked <= labels.keys():
            by = {label for group in BY.findall(expression) for label in re.findall(r"\w+", group)}
            assert by <= OF_SCRAPES.union(*(labels[name] for name in asked)), title
