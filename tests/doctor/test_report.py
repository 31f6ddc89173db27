"""Results are lines for people, or JSON for programs."""

from __future__ import annotations

import io
import json

import pytest

from chiasm.doctor.report import Check, Report, as_json, shown, size, summary

CHECK = Check("port")
RESULTS = [
    CHECK.ok("8000 is free"),
    CHECK.problem("8001 is in use", why="nobody could listen there. " * 8, do="choose another.", command="ss -ltnp"),
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def printed(stream: io.StringIO) -> str:
    report = Report(stream)
    for result in RESULTS:
        report.show(result)
    report.end(RESULTS)
    return stream.getvalue()


def test_each_result_is_a_line_with_what_to_do_below() -> None:
    lines = printed(io.StringIO()).splitlines()
    assert lines[0].split(maxsplit=2) == ["ok", "port", "8000 is free"]
    assert lines[1].split(maxsplit=2) == ["problem", "port", "8001 is in use"]
    assert lines[2].strip().startswith("why: nobody could listen there.")
    assert lines[-3].strip() == "do:  choose another."
    assert lines[-2].strip() == "ss -ltnp"
    assert lines[-1] == "1 problem, 1 ok"
    assert max(map(len, lines)) <= 120


def test_a_terminal_gets_colours_and_the_same_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = printed(Terminal())
    assert "\x1b[32mok" in text
    assert "8001 is in use" in text


def test_json_has_the_fields_of_each_result() -> None:
    report = json.loads(as_json(RESULTS))
    assert report["problems"] is True
    assert report["findings"][0] == {
        "check": "port",
        "verdict": "ok",
        "says": "8000 is free",
        "why": "",
        "do": "",
        "command": "",
    }


def test_json_without_problems() -> None:
    assert json.loads(as_json(RESULTS[:1]))["problems"] is False
    assert summary(RESULTS[:1]) == "1 ok"


def test_control_characters_are_replaced() -> None:
    assert shown("red\x1b[2J\x1b]0;title\x07 and\r\nblue") == "red?[2J?]0;title? and blue"


def test_long_text_is_cut() -> None:
    assert shown("a" * 10_000, 20) == "a" * 20 + "…"


def test_passwords_in_urls_are_hidden() -> None:
    assert shown("http://user:secret@host:8000/health") == "http://***@host:8000/health"


@pytest.mark.parametrize(
    ("count", "text"), [(512, "512 bytes"), (1536, "1.5 KiB"), (3 << 20, "3.0 MiB"), (5000 << 30, "5000.0 GiB")]
)
def test_sizes_have_readable_units(count: int, text: str) -> None:
    assert size(count) == text
