"""The limits of what one client may cost, by name, and how often each has refused something; and all errors, by their codes.

docs/limits.md says of each what it protects and what a client sees.
"""

from __future__ import annotations

import enum

from prometheus_client import CollectorRegistry, Counter

from chiasm.errors import ChiasmError, Code

_OTHER = "other"


class Limit(enum.StrEnum):
    """One limit: the label ``limit`` of the metric of refusals."""

    HEADER_BYTES = "header_bytes"
    HEADER_FIELDS = "header_fields"
    HEADER_TIMEOUT = "header_timeout"
    CONNECTIONS = "connections"
    CONNECTIONS_PER_PEER = "connections_per_peer"
    BODY_BYTES = "body_bytes"
    BODY_RATE = "body_rate"
    BODY_TIMEOUT = "body_timeout"
    REQUESTS = "requests"
    BUFFERED_BYTES = "buffered_bytes"
    REQUEST_SHARE = "request_share"
    KEY_REQUESTS = "key_requests"
    KEY_RATE = "key_rate"
    UNREAD_BODY = "unread_body"
    TEXT_BYTES = "text_bytes"
    JSON_MEMBERS = "json_members"
    JSON_VALUES = "json_values"


class Refusals:
    """Counts what was refused, by limit and by the code of the error."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        """``registry``: where the metric is shown."""
        self._counter = Counter(
            "chiasm_http_refusals",
            "Requests and connections refused, by the limit that was reached.",
            ["limit"],
            registry=registry,
        )
        for limit in Limit:
            self._counter.labels(limit.value)
        self._errors = Counter(
            "chiasm_http_errors",
            "Answers that were an error or ended with one, by the error's code, or its type if it has no code.",
            ["code"],
            registry=registry,
        )
        self._known = {*Code, *_kinds(ChiasmError)}

    def note(self, limit: str) -> None:
        """Count one refusal."""
        self._counter.labels(limit).inc()

    def note_error(self, code: str) -> None:
        """Count one answer that was an error. A code that isn't chiasm's, such as vLLM's, counts as ``other``."""
        self._errors.labels(code if code in self._known else _OTHER).inc()

    def count(self, limit: str) -> int:
        """Return how many there were."""
        return _value(self._counter.labels(limit))

    def count_errors(self, code: str) -> int:
        """Return how many answers had this code."""
        return _value(self._errors.labels(code))


def _value(counter: Counter) -> int:
    return int(next(s.value for m in counter.collect() for s in m.samples if s.name.endswith("_total")))


def _kinds(error: type[ChiasmError]) -> set[str]:
    """Return the types of errors that a class and its subclasses have."""
    return {error.kind}.union(*map(_kinds, error.__subclasses__()))
