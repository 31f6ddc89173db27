"""Whether traces are exported, and where to. Nothing of OpenTelemetry is imported unless they are."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, urlsplit

from chiasm.errors import ConfigurationError
from chiasm.extras import Extra, require

if TYPE_CHECKING:
    from chiasm.proxy.records.otlp import Tracing

OPTION = "--otlp-traces-endpoint"
DEFAULT_PATH = "/v1/traces"
_DELAY = "OTEL_BSP_SCHEDULE_DELAY"
"""Between two exports. Its value is used when the proxy starts to serve, too late for an error in one line."""


def traces_url(endpoint: str) -> str:
    """Return the URL to which spans are posted: the endpoint, with the usual path if it has none.

    Raises ConfigurationError for what is no such URL, and if the extra isn't installed.
    """
    parts = _parts(endpoint)
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigurationError(
            f"{OPTION} must be the URL to which spans are posted by HTTP, such as http://localhost:4318{DEFAULT_PATH}."
        )
    require(Extra.OTEL, OPTION)
    return endpoint if parts.path.strip("/") else parts._replace(path=DEFAULT_PATH).geturl()


def _parts(url: str) -> SplitResult | None:
    """Return the parts of a URL; None if it is malformed."""
    try:
        parts = urlsplit(url)
        return parts if parts.port is None or parts.port else None
    except ValueError:
        return None


def tracing_to(endpoint: str | None, count: Callable[[str, int], None]) -> Tracing | None:
    """Return what makes and exports spans; None without an endpoint, and where ``OTEL_SDK_DISABLED`` says so.

    ``count`` is told, in any thread, what became of how many requests' spans. Raises ConfigurationError.
    """
    if endpoint is None or os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    url = traces_url(endpoint)
    delay = os.environ.get(_DELAY, "").strip() or "1"
    if not (delay.isdecimal() and int(delay)):
        raise ConfigurationError(f"{_DELAY} must be a number of milliseconds above 0, and is {delay!r}.")
    try:
        from chiasm.proxy.records.otlp import Tracing

        return Tracing(url, count)
    except ValueError as error:
        raise ConfigurationError(f"A variable of OpenTelemetry has a value that can't be: {error}.") from None
