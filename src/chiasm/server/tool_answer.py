"""The JSON of chats whose answers may call tools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from chiasm.server.answer_format import ChatFormat
from chiasm.server.protocol import AssistantMessage, ChatChoice, FunctionCall, ToolCall
from chiasm.server.tool_calls import Arguments, CallBegins, Piece, ToolCallParser

if TYPE_CHECKING:
    from chiasm.engine.request import FinishReason
    from chiasm.models.tool_format import ToolFormat
    from chiasm.server.generation import ChoiceState
    from chiasm.server.protocol import Usage
    from chiasm.wire import TokenLogprob

_encode = msgspec.json.Encoder().encode


class ToolChatFormat(ChatFormat):
    """``chat.completion`` and ``chat.completion.chunk``, with the calls that are found in the text."""

    def __init__(
        self, tool_format: ToolFormat, *args: Any, num_choices: int, after_text: bool = True, **kwargs: Any
    ) -> None:
        """``after_text``: calls may begin behind text."""
        super().__init__(*args, num_choices=num_choices, **kwargs)
        self._parsers = [ToolCallParser(tool_format, after_text=after_text) for _ in range(num_choices)]

    def choice(self, index: int, choice: ChoiceState) -> ChatChoice:
        parser = self._parsers[index]
        content: list[str] = []
        calls: list[ToolCall] = []
        for piece in [*parser.add("".join(choice.text)), *parser.finish()]:
            match piece:
                case CallBegins(_, call_id, name):
                    calls.append(ToolCall(call_id, FunctionCall(name, "")))
                case Arguments(_, text):
                    calls[-1].function.arguments += text
                case text:
                    content.append(text)
        result = super().choice(index, choice)
        if calls:
            result.message = AssistantMessage("".join(content) or None, tool_calls=calls)
            result.finish_reason = _reason(result.finish_reason, parser)
        else:
            result.message = AssistantMessage("".join(content))
        return result

    def skip(self, index: int, text: str) -> None:
        self._parsers[index].add(text)

    def text(
        self,
        index: int,
        text: str,
        logprobs: Sequence[TokenLogprob] | None,
        text_offsets: Sequence[int],
        usage: Usage | None,
    ) -> bytes:
        # One event, whatever a token adds: an answer that is continued elsewhere goes on behind whole tokens.
        delta = _delta(self._parsers[index].add(text))
        if not delta and logprobs is None:
            return b""
        return b'%b"delta":%b,"logprobs":%b,"finish_reason":null}]%b' % (
            self._opens[index],
            _encode(delta),
            self.written_logprobs(logprobs, text_offsets),
            self._ending(usage),
        )

    def finish(self, index: int, reason: FinishReason, stop_reason: int | str | None, usage: Usage | None) -> bytes:
        parser = self._parsers[index]
        rest = b'"delta":%b,"logprobs":null,' % _encode(_delta(parser.finish()))
        return self._last_event(index, _reason(reason, parser), stop_reason, usage, rest)


def _reason(reason: Any, parser: ToolCallParser) -> Any:
    """Return why an answer ended: with its calls, unless a stop string has cut the last one off."""
    return "tool_calls" if reason == "stop" and parser.is_complete else reason


def _delta(pieces: Sequence[Piece]) -> dict[str, Any]:
    """Return what pieces add to a message, with one entry for each call."""
    delta: dict[str, Any] = {}
    calls: dict[int, dict[str, Any]] = {}
    for piece in pieces:
        match piece:
            case CallBegins(call, call_id, name):
                function = {"name": name, "arguments": ""}
                calls[call] = {"index": call, "id": call_id, "type": "function", "function": function}
            case Arguments(call, text):
                calls.setdefault(call, {"index": call, "function": {"arguments": ""}})["function"]["arguments"] += text
            case text:
                delta["content"] = delta.get("content", "") + text
    return {**delta, "tool_calls": list(calls.values())} if calls else delta
