"""The bound on log lines that clients cause."""

from __future__ import annotations

import asyncio
import logging
import socket
from urllib.parse import urlsplit

import pytest

from chiasm.http.flood import LINES_PER_WINDOW, WINDOW_SECONDS, FloodLimit, limited
from tests.http.serving import site
from tests.http.test_endpoint import echo

LOGGER = logging.getLogger("tests.flood")


async def test_the_first_lines_pass_and_the_others_are_counted_by_kind(caplog: pytest.LogCaptureFixture) -> None:
    now = [1000.0]
    limit = FloodLimit(LOGGER, lines=5, clock=lambda: now[0])
    passed = [limit.admits("a") for _ in range(5)]
    assert all(passed)
    assert [limit.admits(kind) for kind in "aab"] == [False] * 3
    assert caplog.messages == []
    now[0] += WINDOW_SECONDS
    assert limit.admits("a")
    assert caplog.messages == ["3 more like these: a (2 times), b (1 times)"]
    limit.flush()
    assert len(caplog.messages) == 1


async def test_the_count_comes_also_when_the_flood_has_ended(caplog: pytest.LogCaptureFixture) -> None:
    limit = FloodLimit(LOGGER, lines=0, window_seconds=0.05)
    assert not limit.admits("a")
    written = asyncio.Event()

    def note(record: logging.LogRecord) -> bool:
        written.set()
        return True

    LOGGER.addFilter(note)
    await asyncio.wait_for(written.wait(), 20)
    LOGGER.removeFilter(note)
    assert caplog.messages == ["1 more like these: a (1 times)"]


async def test_the_kinds_are_bounded(caplog: pytest.LogCaptureFixture) -> None:
    limit = FloodLimit(LOGGER, lines=0, window_seconds=1000)
    for number in range(1000):
        limit.admits(str(number))
    limit.flush()
    assert "others (980 times)" in caplog.messages[0]
    assert caplog.messages[0].count("times") == 21


async def test_all_lines_of_a_logger_can_be_limited(caplog: pytest.LogCaptureFixture) -> None:
    with limited(LOGGER.name):
        for number in range(LINES_PER_WINDOW + 5):
            LOGGER.warning("bad %d", number)
    LOGGER.warning("good")
    assert caplog.messages[-1] == "good"
    counted = sum(int(message.split()[0]) for message in caplog.messages if "more like these" in message)
    assert sum(message.startswith("bad") for message in caplog.messages) + counted == LINES_PER_WINDOW + 5


def test_what_is_not_http_is_limited(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("uvicorn.error"), "filters", [])  # other servers of this process have theirs
    sent = LINES_PER_WINDOW + 20
    with site(echo) as server:
        parts = urlsplit(server.url)
        for _ in range(sent):
            with socket.create_connection((parts.hostname, parts.port), timeout=20) as connection:
                connection.sendall(b"no HTTP\r\n\r\n")
                while connection.recv(1000):
                    pass
    counts = [message for message in caplog.messages if "more like these: Invalid HTTP" in message]
    counted = sum(int(message.split()[0]) for message in counts)
    assert sum(message.startswith("Invalid HTTP") for message in caplog.messages) + counted == sent
