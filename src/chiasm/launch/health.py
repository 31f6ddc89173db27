"""What a proxy says of its instances."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from typing import Any

_TIMEOUT_SECONDS = 2.0
_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # HTTP_PROXY is not for this machine


def health(url: str) -> dict[str, Any] | None:
    """The body of GET /health at base URL ``url``, or None when it cannot be had."""
    try:
        with _NO_PROXY.open(f"{url}/health", timeout=_TIMEOUT_SECONDS) as answer:
            body = answer.read()
    except urllib.error.HTTPError as error:
        with error:
            body = error.read()
    except (OSError, http.client.HTTPException):
        return None
    try:
        found = json.loads(body)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def answers(url: str) -> bool:
    """Whether GET /health at base URL ``url`` is answered with 200."""
    try:
        with _NO_PROXY.open(f"{url}/health", timeout=_TIMEOUT_SECONDS) as answer:
            return bool(answer.status == 200)
    except (OSError, http.client.HTTPException):
        return False


def states(url: str) -> dict[str, str]:
    """The state of each instance behind the proxy at ``url``, by the instance's URL; empty when it doesn't answer."""
    instances = (health(url) or {}).get("instances", [])
    return {one["url"]: one["state"] for one in instances}
