"""Calls in the text of an answer, however it is cut into pieces."""

from __future__ import annotations

import json

import pytest

from chiasm.models.tool_format import HERMES, ToolFormat
from chiasm.server.tool_calls import Arguments, CallBegins, Piece, ToolCallParser

NASTY = json.dumps({"a": '</tool_call> } " \\ <tool_call>', "b": [{"c": "{["}, {}], "\\": "é"})


def _call(name: str, arguments: str, form: ToolFormat = HERMES) -> str:
    return form.opening(name) + arguments + form.closing


def _parsed(pieces: list[Piece]) -> tuple[str, list[tuple[str, str]]]:
    """Text, and name and arguments of each call."""
    text, calls = "", dict[int, list[str]]()
    for piece in pieces:
        match piece:
            case CallBegins(number, call_id, name):
                assert call_id.startswith("call_")
                assert number == len(calls)
                calls[number] = [name, ""]
            case Arguments(number, more):
                assert number == len(calls) - 1
                calls[number][1] += more
            case more:
                text += more
    return text, [(name, arguments) for name, arguments in calls.values()]


ANSWERS = {
    "text": ("Hello, a < b.\n ", ("Hello, a < b.\n ", [])),
    "a call": (_call("f", '{"x": 1}'), ("", [("f", '{"x": 1}')])),
    "text and a call": ("Let me see.\n" + _call("f", "{}"), ("Let me see.", [("f", "{}")])),
    "two calls": (_call("f", "{}") + "\n" + _call("g-2", NASTY), ("", [("f", "{}"), ("g-2", NASTY)])),
    "nearly a call": ("<tool <tool_cal", ("<tool <tool_cal", [])),
    "cut off in the arguments": (_call("f", NASTY)[:60], ("", [("f", NASTY[: 60 - len(HERMES.opening("f"))])])),
    "cut off in the name": ("So: " + HERMES.opening("f")[:20], ("So:", [])),
    "compact": ('<tool_call>{"name":"f","arguments":{"x":1}}</tool_call>', ("", [("f", '{"x":1}')])),
}


@pytest.mark.parametrize(("answer", "expected"), ANSWERS.values(), ids=ANSWERS.keys())
def test_calls_are_found_in_one_piece_and_character_by_character(
    answer: str, expected: tuple[str, list[tuple[str, str]]]
) -> None:
    for size in (1, 2, 3, 7, len(answer)):
        parser = ToolCallParser(HERMES)
        pieces = [piece for start in range(0, len(answer), size) for piece in parser.add(answer[start : start + size])]
        assert _parsed([*pieces, *parser.finish()]) == expected


def test_behind_the_beginning_of_an_answer_a_call_is_text_where_calls_come_first() -> None:
    json_with_call = json.dumps({"how": _call("f", "{}")})
    for answer in (json_with_call, " " + json_with_call, "<tool" + json_with_call):
        for size in (1, 3, len(answer)):
            parser = ToolCallParser(HERMES, after_text=False)
            pieces = [one for start in range(0, len(answer), size) for one in parser.add(answer[start : start + size])]
            assert _parsed([*pieces, *parser.finish()]) == (answer, [])
    parser = ToolCallParser(HERMES, after_text=False)
    assert _parsed(parser.add(_call("f", NASTY) + "\n" + _call("g", "{}"))) == ("", [("f", NASTY), ("g", "{}")])


def test_text_is_told_as_soon_as_it_cannot_begin_a_call() -> None:
    parser = ToolCallParser(HERMES)
    assert parser.add("a <") == ["a"]
    assert parser.add("b") == [" <b"]


def test_other_words_and_keys_are_understood() -> None:
    form = ToolFormat("[CALL] ", " [END]", " ", "parameters")
    parser = ToolCallParser(form)
    pieces = parser.add("Well. " + _call("f", NASTY, form) + " " + _call("g", "{}", form))
    assert _parsed([*pieces, *parser.finish()]) == ("Well.", [("f", NASTY), ("g", "{}")])
