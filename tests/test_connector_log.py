"""What is logged of connectors that raise errors they shouldn't."""

from __future__ import annotations

import pytest

from chiasm.connectors import faults
from chiasm.connectors.faults import LOG_SECONDS, Faults, log_failure
from chiasm.ec_transfer import ECTransferConfig


class Clock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def monotonic(self) -> float:
        return self.seconds


class Failing:
    """As much of a connector as the log needs."""

    plane = "EC"
    config = ECTransferConfig(connector="Mine")

    def __init__(self) -> None:
        self.faults = Faults()

    def fail(self) -> None:
        try:
            raise OSError("the connector is broken")
        except OSError:
            log_failure(self, "work")

    def fail_elsewhere(self) -> None:
        try:
            raise OSError("the connector is broken")
        except OSError:
            log_failure(self, "rest")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(faults, "time", clock)
    return clock


def test_an_error_is_logged_once_in_a_while_and_always_counted(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    connector = Failing()
    for _ in range(5):
        connector.fail()
        clock.seconds += 1
    assert [record.getMessage() for record in caplog.records] == ["The EC connector Mine failed to work."]
    assert "the connector is broken" in caplog.text
    clock.seconds += LOG_SECONDS
    connector.fail()
    assert caplog.records[-1].getMessage().endswith("So it has 4 times since this was logged last.")
    assert connector.faults.count == 6


def test_an_error_of_another_line_or_connector_is_logged_at_once(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    connector, other = Failing(), Failing()
    connector.fail()
    connector.fail_elsewhere()
    other.fail()
    assert len(caplog.records) == 3


def test_lines_that_are_remembered_are_bounded(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    connector = Failing()
    for number in range(200):
        code = compile("def fail(): raise OSError", f"module_{number}.py", "exec")
        scope: dict[str, object] = {}
        exec(code, scope)
        try:
            scope["fail"]()  # type: ignore[operator]
        except OSError:
            log_failure(connector, "work")
    assert len(caplog.records) == 200
    assert len(connector.faults._logged_at) <= 64
