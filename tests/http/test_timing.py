"""``Server-Timing``, written and read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiasm.http.timing import TimingEntry, duration_seconds, read_timing, write_timing


def test_seconds_are_written_as_milliseconds() -> None:
    written = write_timing(
        [TimingEntry("fetch", 0.0015), TimingEntry("item0", 0.25, "hit"), TimingEntry("plain", at=0.5)]
    )
    assert written == 'fetch;dur=1.500, item0;desc="hit";dur=250.000, plain;at=500.000'


names = st.text("abcdefgh-_0123456789", min_size=1, max_size=8)
durations = st.none() | st.integers(0, 10**6).map(lambda microseconds: microseconds / 10**6)
descriptions = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=12)


@given(st.lists(st.builds(TimingEntry, names, durations, descriptions, durations), max_size=5))
def test_what_is_written_is_read(entries: list[TimingEntry]) -> None:
    read = read_timing(write_timing(entries))
    assert [(entry.name, entry.description) for entry in read] == [(e.name, e.description) for e in entries]
    assert [entry.seconds for entry in read] == [
        e.seconds if e.seconds is None else pytest.approx(e.seconds) for e in entries
    ]
    assert [entry.at for entry in read] == [e.at if e.at is None else pytest.approx(e.at) for e in entries]


@given(st.text(max_size=60))
def test_nothing_that_a_server_sends_raises(header: str) -> None:
    read_timing(header)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, []),
        ("", []),
        ("a;dur=1, ;;;, b;dur=2", [("a", 0.001), ("b", 0.002)]),
        ("a;dur=x", [("a", None)]),
        ("a;dur=1e999, b;dur=nan, c;dur=-1, d;dur=" + "9" * 400, [("a", None), ("b", None), ("c", None), ("d", None)]),
        ('a;desc="x, y";dur="3"', [("a", 0.003)]),
        ("a;DUR=1 , b", [("a", 0.001), ("b", None)]),
        ('a;at=1;dur=2, b;dur=3;desc="x", c;dur=4', [("a", 0.002), ("b", 0.003), ("c", 0.004)]),
        ("a;dur=1.2.3, b;dur=.", [("a", None), ("b", None)]),
        ("x" * 9000, []),
    ],
)
def test_what_is_not_well_formed_is_left_out(header: str | None, expected: list[tuple[str, float | None]]) -> None:
    assert [(entry.name, entry.seconds) for entry in read_timing(header)] == expected


def test_a_duration_is_found_by_its_name() -> None:
    header = "total;dur=5, encode;dur=12.5"
    assert duration_seconds(header, "encode") == 0.0125
    assert duration_seconds(header, "prefill") is None
