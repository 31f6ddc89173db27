"""Reads pages in Prometheus' text format: what instances and the proxy answer to GET /metrics."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample


def read_samples(page: str) -> list[Sample]:
    """Return the samples of a page in order; lines that are not valid are left out."""
    found: list[Sample] = []
    # One line at a time: the parser gives up at the first invalid line, and renames counters by their TYPE line.
    for line in page.split("\n"):
        if line and not line.startswith("#"):
            try:
                found += [sample for family in text_string_to_metric_families(line) for sample in family.samples]
            except (ValueError, IndexError):
                continue
    return found


def total(samples: Iterable[Sample], name: str, **labels: str) -> float | None:
    """Return the sum of the samples of a metric that have these labels; None if there are none."""
    values = [one.value for one in samples if one.name == name and labels.items() <= one.labels.items()]
    return sum(values) if values else None
