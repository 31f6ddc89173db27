"""What one worker of a proxy believes another one, and how their metrics become one page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from chiasm.proxy.siblings import Repeater, Siblings, Worker, is_from_sibling, merged
from chiasm.wire import WORKER_HEADER


@pytest.mark.parametrize(
    ("client", "header", "seen", "is_sibling"),
    [
        (("10.0.0.1", 1), b"", ("10.0.0.1", 1), False),
        (("10.0.0.1", 1), b"127.0.0.1", ("10.0.0.1", 1), False),
        (None, b"10.0.0.1", ("10.0.0.1", 0), True),
        (None, b"", None, True),
    ],
)
async def test_only_who_comes_through_their_folder_speaks_for_others(
    tmp_path: Path, client: Any, header: bytes, seen: Any, is_sibling: bool
) -> None:
    found: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        found.append(scope)

    async def never(*_: Any) -> Any:
        raise AssertionError

    repeater = Repeater(app, Siblings(Worker(0, 2, tmp_path)))
    headers = [(WORKER_HEADER.encode(), header)]
    await repeater(
        {"type": "http", "method": "GET", "path": "/metrics", "headers": headers, "client": client}, never, never
    )
    assert (found[0]["client"], is_from_sibling(found[0])) == (seen, is_sibling)


def test_a_page_of_metrics_has_each_metric_once() -> None:
    page = b'# HELP a About a.\n# TYPE a counter\na_total 1.0\n# HELP b About b.\n# TYPE b gauge\nb{x="y"} 2.0\n'
    assert merged({"0": page, "1": page}) == (
        b'# HELP a About a.\n# TYPE a counter\na_total{worker="0"} 1.0\na_total{worker="1"} 1.0\n'
        b'# HELP b About b.\n# TYPE b gauge\nb{worker="0",x="y"} 2.0\nb{worker="1",x="y"} 2.0\n'
    )
