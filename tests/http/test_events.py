"""Server-sent events: whole ones go on, halves are held back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiasm.http import events
from chiasm.http.events import EventSplitter


@given(st.lists(st.sampled_from([b"data: a\n\n", b": note\r\n\r\n", b"data: b\ndata: c\n\n"]), max_size=6), st.data())
def test_events_come_out_whole_however_they_arrive(whole: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(whole)
    splitter = EventSplitter()
    out: list[bytes] = []
    at = 0
    while at < len(stream):
        end = data.draw(st.integers(at + 1, len(stream)))
        out.append(splitter.take(stream[at:end]))
        at = end
    assert b"".join(out) == stream
    assert all(not part or part.endswith((b"\n\n", b"\r\n\r\n")) for part in out)


def test_half_an_event_is_held_back_until_it_is_asked_for() -> None:
    splitter = EventSplitter()
    assert splitter.take(b"data: a\n\ndata: ha") == b"data: a\n\n"
    assert splitter.rest() == b"data: ha"
    assert splitter.rest() == b""


def test_an_event_of_absurd_length_is_passed_on_in_pieces() -> None:
    splitter = EventSplitter()
    piece = b"x" * (events.MAX_EVENT_BYTES + 1)
    assert splitter.take(piece) == piece


def test_a_long_event_in_many_pieces_is_searched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    searched = 0
    search = events._end_of_events

    def counting(data: bytearray, start: int) -> int:
        nonlocal searched
        searched += len(data) - start
        return search(data, start)

    monkeypatch.setattr(events, "_end_of_events", counting)
    splitter = EventSplitter()
    pieces = [b"data: ", *[b"x" * 1000] * 1000, b"\r\n\r", b"\n"]
    assert b"".join(map(splitter.take, pieces)) == b"".join(pieces)
    assert searched < 1.01 * len(b"".join(pieces))


def test_comments_and_events_are_framed() -> None:
    assert events.event(b"{}") == b"data: {}\n\n"
    assert events.comment("tokens", "1 2") == b": tokens 1 2\n\n"
    assert events.comment_line("tokens", "1 2") + events.event(b"{}") == b": tokens 1 2\ndata: {}\n\n"
