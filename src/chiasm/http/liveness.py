"""What a supervisor asks: whether the process lives (``/livez``), and whether it takes requests (``/readyz``).

A process that isn't ready is left alone and gets no requests; one that doesn't live is started again. So ``/livez`` depends on
nothing but the event loop.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from chiasm.http.body import json_response


async def live(request: Request) -> Response:
    """Answer with 200: whatever else is wrong, the event loop runs."""
    return json_response({"status": "ok"})


def ready_response(status: str, is_ready: bool) -> Response:
    """Return the answer to ``/readyz``: 200 if requests are taken, otherwise 503."""
    return json_response({"status": status}, 200 if is_ready else 503)
