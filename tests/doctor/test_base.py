"""What others say is shown in a way that harms nobody."""

from __future__ import annotations

import pytest

from chiasm.doctor.report import shown, size


def test_what_steers_a_terminal_is_taken_out() -> None:
    assert shown("red\x1b[2J\x1b]0;title\x07 and\r\nblue") == "red?[2J?]0;title? and blue"


def test_what_is_long_is_cut() -> None:
    assert shown("a" * 10_000, 20) == "a" * 20 + "…"


def test_passwords_in_urls_are_left_out() -> None:
    assert shown("http://user:secret@host:8000/health") == "http://***@host:8000/health"


@pytest.mark.parametrize(
    ("count", "text"), [(512, "512 bytes"), (1536, "1.5 KiB"), (3 << 20, "3.0 MiB"), (5000 << 30, "5000.0 GiB")]
)
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text
