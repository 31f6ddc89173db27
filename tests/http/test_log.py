"""When the lines of requests are written."""

from __future__ import annotations

import asyncio
import logging
import time

import pytest

from chiasm.http.config import REQUESTS
from chiasm.http.log import GATHERED_LINES, RequestLog
from chiasm.http.visit import Visit


@pytest.fixture(autouse=True)
def level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def ended(request_id: str, status: int = 200) -> Visit:
    """Return the visit of an answered request."""
    headers = [(b"x-request-id", request_id.encode())]
    visit = Visit({"type": "http", "method": "POST", "path": "/", "headers": headers})
    visit.asks_for_answer = True
    visit.note({"type": "http.response.start", "status": status, "headers": []})
    visit.is_complete = True
    return visit


class Written(logging.Handler):
    """Waits for a line."""

    def __init__(self) -> None:
        super().__init__()
        self._event = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self._event.set()

    async def wait(self) -> None:
        logging.getLogger("chiasm.access").addHandler(self)
        try:
            await asyncio.wait_for(self._event.wait(), 60)
        finally:
            logging.getLogger("chiasm.access").removeHandler(self)


def ids(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage().split()[0].removeprefix("id=") for record in caplog.records]


async def test_lines_wait_for_each_other_and_soon_come_without_more_requests(caplog: pytest.LogCaptureFixture) -> None:
    log = RequestLog(REQUESTS)
    for name in "ab":
        log.note(ended(name))
    assert ids(caplog) == []
    await Written().wait()
    assert ids(caplog) == ["a", "b"]


async def test_many_are_written_without_waiting(caplog: pytest.LogCaptureFixture) -> None:
    log = RequestLog(REQUESTS)
    for number in range(GATHERED_LINES):
        assert ids(caplog) == []
        log.note(ended(str(number)))
    assert len(ids(caplog)) == GATHERED_LINES


async def test_a_failure_is_written_at_once_behind_those_before_it(caplog: pytest.LogCaptureFixture) -> None:
    log = RequestLog(REQUESTS)
    log.note(ended("a"))
    log.note(ended("b", status=500))
    assert ids(caplog) == ["a", "b"]


async def test_nothing_waits_once_the_log_is_closed(caplog: pytest.LogCaptureFixture) -> None:
    log = RequestLog(REQUESTS)
    log.note(ended("a"))
    log.close()
    assert ids(caplog) == ["a"]
    log.note(ended("b"))
    assert ids(caplog) == ["a", "b"]


async def test_a_line_has_the_time_of_the_end_and_not_of_its_writing(caplog: pytest.LogCaptureFixture) -> None:
    log = RequestLog(REQUESTS)
    log.note(ended("a"))
    after = time.time()
    await Written().wait()
    assert caplog.records[0].created <= after
