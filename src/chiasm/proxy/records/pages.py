"""``GET /requests``, one request and its trace, and the dashboard that shows them. For the operator."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from functools import cache
from importlib.resources import files

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from chiasm.errors import InvalidRequestError, PathNotFoundError
from chiasm.http import json_response
from chiasm.http.admin import AdminCheck
from chiasm.proxy.records.critical import critical_path
from chiasm.proxy.records.record import Record
from chiasm.proxy.records.ring import KEPT, Records
from chiasm.proxy.records.spans import Span, timeline_of
from chiasm.proxy.records.trace_file import trace_of

_SHOWN = 50
_MAX_ID_CHARACTERS = 128
_ROUTES = ("/requests", "/requests/{id}", "/requests/{id}/trace.json")
_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)
_STYLE = re.compile(r"<style>(.*?)</style>", re.DOTALL)


class SpanInfo(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One stage of a request. Seconds from the request's arrival."""

    name: str
    where: str
    """``proxy``, or the address of an instance."""
    start: float
    end: float
    item: int | None = None
    """Index of the image."""
    is_wait: bool = False
    """Whether nothing is done for the request meanwhile."""


class RecordInfo(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One request, without its spans."""

    id: str
    path: str
    status: int
    """499: the client left."""
    arrived: float
    """Unix time."""
    seconds: float
    """To the end of the answer."""
    first_token_seconds: float | None = None
    covered: float | None = None
    """The part of the time to the first token that spans cover."""
    overlap_seconds: float = 0.0
    """How much later the first token would have come if one stage had begun where another ended."""
    key: str = ""
    details: dict[str, object] = {}
    """``model``, ``images`` and ``instances``."""
    tokens: dict[str, int] = {}
    stages: dict[str, float] = {}
    """Seconds, by the names in ``Server-Timing``."""
    spans: list[SpanInfo] = []
    critical_path: list[SpanInfo] = []


class RecordList(msgspec.Struct, kw_only=True):
    """Answer of GET /requests."""

    now: float
    """Unix time."""
    requests: list[RecordInfo]


def record_routes(records: Records, admin: AdminCheck) -> list[BaseRoute]:
    """Return the routes."""

    async def show_list(request: Request) -> Response:
        admin.check_may_see(request.scope)
        limit = _limit(request.query_params.get("limit", str(_SHOWN)))
        order = request.query_params.get("order", "last")
        if order not in ("last", "slowest"):
            raise InvalidRequestError("order must be last or slowest.", param="order")
        found = records.last() if order == "last" else records.slowest()
        shown = [info_of(record) for record, _ in zip(found, range(limit), strict=False)]
        return _unkept(json_response(RecordList(now=time.time(), requests=shown)))

    async def show_one(request: Request) -> Response:
        admin.check_may_see(request.scope)
        return _unkept(json_response(info_of(_found(records, request))))

    async def show_trace(request: Request) -> Response:
        admin.check_may_see(request.scope)
        return _unkept(json_response(trace_of(_found(records, request))))

    async def show_dashboard(request: Request) -> Response:
        # With an admin key the page is for everybody: it has no data, and asks for the key with which it gets some.
        if not admin.has_key:
            admin.check_may_see(request.scope)
        page, policy = dashboard()
        headers = {
            "content-security-policy": policy,
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
        }
        return _unkept(Response(page, media_type="text/html; charset=utf-8", headers=headers))

    routes = [Route(path, handler) for path, handler in zip(_ROUTES, (show_list, show_one, show_trace), strict=True)]
    return [*routes, Route("/dashboard", show_dashboard)]


def info_of(record: Record) -> RecordInfo:
    """Return what the operator sees of a record."""
    timeline = timeline_of(record)
    return RecordInfo(
        id=record.id,
        path=record.path,
        status=record.status,
        arrived=record.arrived,
        seconds=record.seconds,
        first_token_seconds=timeline.first_token,
        covered=timeline.covered(),
        overlap_seconds=timeline.overlap_seconds(),
        key=record.key,
        details=dict(record.details),
        tokens=dict(record.tokens),
        stages=dict(record.stages),
        spans=[_span(span) for span in timeline.spans],
        critical_path=[_span(span) for span in critical_path(timeline)],
    )


@cache
def dashboard() -> tuple[str, str]:
    """Return the page, and the Content-Security-Policy that lets its own script and style run, and nothing else."""
    page = files("chiasm.proxy.records").joinpath("dashboard.html").read_text("utf-8")
    script, style = (" ".join(map(_hash, kind.findall(page))) for kind in (_SCRIPT, _STYLE))
    policy = (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src blob: data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _span(span: Span) -> SpanInfo:
    return SpanInfo(
        name=span.name, where=span.where, start=span.start, end=span.end, item=span.item, is_wait=span.is_wait
    )


def _found(records: Records, request: Request) -> Record:
    name: str = request.path_params["id"]
    record = records.find(name)
    if record is None:
        raise PathNotFoundError(
            f"There is no record of the request {name[:_MAX_ID_CHARACTERS]!r}: the last {KEPT} and the slowest are kept."
        )
    return record


def _limit(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 5 and 0 < int(text) <= KEPT):
        raise InvalidRequestError(f"limit must be a number from 1 to {KEPT}.", param="limit")
    return int(text)


def _unkept(response: Response) -> Response:
    response.headers["cache-control"] = "no-store"
    return response
