"""How a model is told of tools, and how it calls them.

Where a checkpoint's chat template knows tools, what it renders for calls shows the format (:mod:`chiasm.models.chat`). For
other templates, tools are described in the words of Hermes (NousResearch/Hermes-Function-Calling), which Qwen2.5 and Qwen3
share.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]


@dataclass(frozen=True)
class ToolFormat:
    """How an answer writes a call: ``begin``, a JSON object with the tool's name and its arguments, ``end``."""

    begin: str = "<tool_call>\n"
    end: str = "\n</tool_call>"
    between: str = "\n"
    """What stands between two calls."""
    arguments_key: str = "arguments"

    @property
    def trigger(self) -> str:
        """The text at which a call begins, wherever it occurs in an answer."""
        return self.begin.strip()

    def opening(self, name: str) -> str:
        """Return what a call of a tool has before its arguments."""
        return f'{self.begin}{{"name": {json.dumps(name)}, "{self.arguments_key}": '

    @property
    def closing(self) -> str:
        """What a call has behind its arguments."""
        return "}" + self.end


HERMES = ToolFormat()


# ---- templates that don't know tools -------------------------------------------------------------------------------------


def described(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], *, has_system: bool) -> list[Message]:
    """Return the messages with tools and calls in plain text, for a template that knows neither.

    The tools are described in the system message, or at the start of the first one if the template has no system messages
    (``has_system``). Calls stand in the text of the assistant, and the results of tools in messages of the user.
    """
    result: list[Message] = []
    has_responses = False
    for message in messages:
        match message:
            case {"role": "tool"}:
                response = _as_response(message)
                if has_responses:
                    result[-1] = _joined(result[-1], response)
                else:
                    result.append(response)
            case {"role": "assistant", "tool_calls": [_, *_]}:
                result.append(_with_calls(message))
            case _:
                result.append(message)
        has_responses = isinstance(message, dict) and message.get("role") == "tool"
    if not tools:
        return result
    description = {"role": "system", "content": _description(tools)}
    if not has_system:
        return [_joined({**description, "role": result[0].get("role")}, result[0], "\n\n"), *result[1:]]
    if result[0].get("role") == "system":
        return [_joined(result[0], description, "\n\n"), *result[1:]]
    return [description, *result]


def _description(tools: Sequence[Mapping[str, Any]]) -> str:
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        f"You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n{lines}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML "
        'tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    )


def _with_calls(message: Message) -> Message:
    calls = HERMES.between.join(
        HERMES.opening(function["name"]) + _as_json(function["arguments"]) + HERMES.closing
        for function in (call["function"] for call in message["tool_calls"])
    )
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return _joined(rest, {"content": calls}) if message.get("content") else {**rest, "content": calls}


def _as_json(arguments: object) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _as_response(message: Message) -> Message:
    """Return what a tool has answered, as a user would say it."""
    before, after = "<tool_response>\n", "\n</tool_response>"
    content = message.get("content")
    if isinstance(content, list):
        return {"role": "user", "content": [_text(before), *content, _text(after)]}
    return {"role": "user", "content": f"{before}{content or ''}{after}"}


def _joined(message: Message, more: Mapping[str, Any], separator: str = "\n") -> Message:
    """Return ``message`` with the content of ``more`` behind its own."""
    first, second = message.get("content"), more.get("content")
    if not isinstance(first, list) and not isinstance(second, list):
        return {**message, "content": f"{first or ''}{separator}{second or ''}"}
    parts = [part if isinstance(part, list) else [_text(part or "")] for part in (first, second)]
    return {**message, "content": [*parts[0], _text(separator), *parts[1]]}


def _text(text: str) -> Message:
    return {"type": "text", "text": text}
