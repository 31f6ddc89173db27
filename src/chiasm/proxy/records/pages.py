"""``GET /requests``, one request and its trace, and the dashboard that shows them. For the operator."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from itertools import chain, islice
from typing import NamedTuple
from urllib.parse import urlencode

import msgspec
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Scope

from chiasm.errors import InvalidRequestError, PathNotFoundError
from chiasm.http import json_response
from chiasm.http.admin import AdminCheck
from chiasm.proxy.records.info import RecordInfo, info_of
from chiasm.proxy.records.record import Record
from chiasm.proxy.records.ring import KEPT, Records
from chiasm.proxy.records.trace_file import trace_of
from chiasm.proxy.siblings import Siblings, is_from_sibling
from chiasm.wire import UNREADABLE

_SHOWN = 50
_MAX_ID_CHARACTERS = 128
_LIST_PATH = "/requests"
_ORDERS: dict[str, Callable[[RecordInfo], float]] = {
    "last": lambda one: one.arrived + one.seconds,
    "slowest": lambda one: one.seconds,
}
"""What each order goes by, the largest first: when requests ended, and how long they took."""
_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)
_STYLE = re.compile(r"<style>(.*?)</style>", re.DOTALL)
_logger = logging.getLogger(__name__)


class RecordList(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Answer of GET /requests. Of a proxy with several workers it has the requests of all of them."""

    now: float
    """Unix time."""
    requests: list[RecordInfo]
    silent_workers: list[int] = []
    """Numbers of the workers that didn't tell theirs."""


_list = msgspec.json.Decoder(RecordList)


class _Question(NamedTuple):
    """What ``/requests`` is asked for."""

    limit: int
    order: str
    id: str | None = None

    @property
    def path(self) -> str:
        """The path and the query that ask for the same."""
        query = {name: value for name, value in self._asdict().items() if value is not None}
        return f"{_LIST_PATH}?{urlencode(query)}"

    def sorted(self, found: Iterable[RecordInfo]) -> list[RecordInfo]:
        """Return what is to be shown."""
        return sorted(found, key=_ORDERS[self.order], reverse=True)[: self.limit]


def record_routes(records: Records, admin: AdminCheck, siblings: Siblings | None) -> list[BaseRoute]:
    """Return the routes; ``siblings`` are the other workers of the proxy, if it has several."""

    async def found(question: _Question, scope: Scope) -> RecordList:
        """Return the records of all workers, or to one of them those of this one."""
        own = records.last() if question.order == "last" else records.slowest()
        if question.id is not None:
            own = records.named(question.id)
        kept = list(islice(own, question.limit))
        pages: dict[int, bytes | None] = {}
        if siblings is not None and not is_from_sibling(scope):
            pages = await siblings.pages(scope, question.path)
        return await asyncio.to_thread(_assembled, question, kept, pages)  # it may take seconds

    async def found_one(request: Request) -> RecordInfo:
        """Return the newest record of the id in the path."""
        name: str = request.path_params["id"]
        answer = None
        if len(name) <= _MAX_ID_CHARACTERS:
            answer = await found(_Question(1, "last", name), request.scope)
            if answer.requests:
                return answer.requests[0]
        raise _no_record(name, [] if answer is None else answer.silent_workers)

    async def shown(content: object) -> Response:
        return _unkept(await asyncio.to_thread(json_response, content))

    async def show_list(request: Request) -> Response:
        admin.check_may_see(request.scope)
        return await shown(await found(_question(request.query_params), request.scope))

    async def show_one(request: Request) -> Response:
        admin.check_may_see(request.scope)
        return await shown(await found_one(request))

    async def show_trace(request: Request) -> Response:
        admin.check_may_see(request.scope)
        return await shown(trace_of(await found_one(request)))

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

    return [
        Route(_LIST_PATH, show_list),
        Route(f"{_LIST_PATH}/{{id}}", show_one),
        Route(f"{_LIST_PATH}/{{id}}/trace.json", show_trace),
        Route("/dashboard", show_dashboard),
    ]


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


def _assembled(question: _Question, own: Sequence[Record], pages: Mapping[int, bytes | None]) -> RecordList:
    """Return what the operator sees of the records of this worker and of those that others tell."""
    answer = RecordList(now=time.time(), requests=[info_of(one) for one in own])
    if pages:
        told = {number: _read(number, page) for number, page in pages.items()}
        lists = [answer, *(one for one in told.values() if one is not None)]
        answer.requests = question.sorted(chain.from_iterable(one.requests for one in lists))
        answer.silent_workers = sorted(number for number, one in told.items() if one is None)
    return answer


def _read(number: int, page: bytes | None) -> RecordList | None:
    """Return what a worker tells; None if it tells nothing that can be read."""
    try:
        return None if page is None else _list.decode(page)
    except UNREADABLE as error:
        _logger.warning("the records of worker %d can't be read: %s", number, error)
        return None


def _no_record(name: str, silent_workers: Sequence[int]) -> PathNotFoundError:
    silent = "".join(f" Worker {number} of the proxy didn't answer." for number in silent_workers)
    return PathNotFoundError(
        f"There is no record of the request {name[:_MAX_ID_CHARACTERS]!r}: the last {KEPT} and the slowest are kept.{silent}"
    )


def _question(query: QueryParams) -> _Question:
    order = query.get("order", "last")
    if order not in _ORDERS:
        raise InvalidRequestError(f"order must be {' or '.join(_ORDERS)}.", param="order")
    return _Question(_limit(query.get("limit", str(_SHOWN))), order, query.get("id"))


def _limit(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 5 and 0 < int(text) <= KEPT):
        raise InvalidRequestError(f"limit must be a number from 1 to {KEPT}.", param="limit")
    return int(text)


def _unkept(response: Response) -> Response:
    response.headers["cache-control"] = "no-store"
    return response
