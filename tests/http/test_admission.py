"""Bounds on all requests together: places, bytes, and who makes way."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import pytest

from chiasm.errors import ChiasmError, Code, OverloadedError, PayloadTooLargeError
from chiasm.http import Admission
from chiasm.http.config import HttpConfig
from chiasm.http.limits import Limit, Refusals

CONFIG = HttpConfig(max_request_share=0.5, small_request_bytes=10, small_request_share=0.2)


@dataclass(eq=False)
class Request:
    """A request that holds bytes."""

    admission: Admission
    arrival: float = field(default_factory=time.monotonic)
    held_bytes: int = 0
    interruption: Exception | None = None

    def hold(self, size_bytes: int) -> None:
        self.admission.hold(self, size_bytes)

    def release(self) -> None:
        self.admission.release(self, self.held_bytes)

    def interrupt(self, reason: Exception) -> None:
        self.interruption = reason


@pytest.fixture
def admission() -> Admission:
    return Admission(2, 100, CONFIG, Refusals())


def test_one_request_may_hold_its_share_and_no_more(admission: Admission) -> None:
    request = Request(admission)
    request.hold(50)
    with pytest.raises(PayloadTooLargeError) as caught:
        request.hold(1)
    assert (caught.value.code, caught.value.limit) == (Code.REQUEST_TOO_LARGE, Limit.REQUEST_SHARE)
    assert admission.held_bytes == request.held_bytes == 50


def test_the_last_part_is_for_small_requests(admission: Admission) -> None:
    for _ in range(2):
        Request(admission).hold(40)
    with pytest.raises(OverloadedError) as caught:
        Request(admission).hold(11)
    assert caught.value.limit == Limit.BUFFERED_BYTES
    for _ in range(2):
        Request(admission).hold(10)
    with pytest.raises(OverloadedError):
        Request(admission).hold(1)


def test_a_request_that_grows_is_small_no_longer(admission: Admission) -> None:
    for _ in range(2):
        Request(admission).hold(40)
    request = Request(admission)
    request.hold(10)
    with pytest.raises(OverloadedError):
        request.hold(1)


def test_large_bodies_that_have_been_arriving_for_long_make_way_the_oldest_first(admission: Admission) -> None:
    now = time.monotonic()
    oldest, old, new = (Request(admission, arrival=now - age) for age in (60, 30, 0))
    admission.begin_reading(oldest)
    admission.begin_reading(old)
    oldest.hold(40)
    old.hold(40)
    new.hold(40)
    assert isinstance(oldest.interruption, ChiasmError)
    assert (oldest.held_bytes, old.interruption, admission.held_bytes) == (0, None, 80)


def test_one_whose_body_is_there_does_not_make_way(admission: Admission) -> None:
    answered = Request(admission, arrival=time.monotonic() - 60)
    admission.begin_reading(answered)
    answered.hold(40)
    admission.begin_answering(answered)
    Request(admission).hold(40)
    with pytest.raises(OverloadedError):
        Request(admission).hold(40)
    assert answered.interruption is None


def test_a_body_that_arrives_takes_no_place(admission: Admission) -> None:
    requests = [Request(admission) for _ in range(4)]
    for request in requests:
        admission.begin_reading(request)
    for request in requests[:2]:
        admission.begin_answering(request)
    assert admission.requests == 4
    for begin, request in ((admission.begin_reading, Request(admission)), (admission.begin_answering, requests[2])):
        with pytest.raises(OverloadedError) as caught:
            begin(request)
        assert caught.value.limit == Limit.REQUESTS
    for request in requests:
        admission.leave(request)
    assert admission.requests == 0
