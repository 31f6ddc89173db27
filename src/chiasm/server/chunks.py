"""Chunks of streams. What is the same in all chunks of an answer is encoded once; per token only the text is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from chiasm.server import sse
from chiasm.server.protocol import ChatLogprobs, CompletionLogprobs, Usage

if TYPE_CHECKING:
    from chiasm.engine.request import FinishReason

_encode = msgspec.json.Encoder().encode
_USAGE_TO_COME = b',"usage":null}\n\n'
_NO_USAGE = b"}\n\n"


class _Head(msgspec.Struct):
    id: str
    object: str
    created: int
    model: str


class Chunks:
    """Events of one stream; a subclass says how text stands in a choice.

    With ``announces_usage`` every chunk has the field, null until the usage comes.
    """

    object_name: str
    before_text: bytes
    after_text: bytes
    without_text: bytes

    def __init__(
        self, answer_id: str, created: int, model: str, num_choices: int, *, announces_usage: bool = False
    ) -> None:
        self.created = created
        head = b"data: " + _encode(_Head(answer_id, self.object_name, created, model))[:-1]
        self._head = head + b',"choices":['
        self._opens = [self._head + b'{"index":%d,' % index for index in range(num_choices)]
        self._end = _USAGE_TO_COME if announces_usage else _NO_USAGE

    def role(self, index: int) -> bytes:
        """The first chunk of a choice, where there is one before its text."""
        return b""

    def text(
        self,
        index: int,
        text: str,
        logprobs: ChatLogprobs | CompletionLogprobs | None = None,
        usage: Usage | None = None,
    ) -> bytes:
        """More text of a choice."""
        return b"".join(
            (
                self._opens[index],
                self.before_text,
                _encode(text),
                self.after_text,
                b"null" if logprobs is None else _encode(logprobs),
                b',"finish_reason":null}]',
                self._ending(usage),
            )
        )

    def finish(
        self, index: int, reason: FinishReason, stop_reason: int | str | None, usage: Usage | None = None
    ) -> bytes:
        """The end of a choice."""
        return b"".join(
            (
                self._opens[index],
                self.without_text,
                b'"finish_reason":',
                _encode(reason),
                b',"stop_reason":',
                _encode(stop_reason),
                b"}]",
                self._ending(usage),
            )
        )

    def usage(self, usage: Usage) -> bytes:
        """The usage, in a chunk without choices."""
        return sse.event(self._head.removeprefix(b"data: ") + b'],"usage":' + _encode(usage) + b"}")

    def _ending(self, usage: Usage | None) -> bytes:
        return self._end if usage is None else b',"usage":' + _encode(usage) + _NO_USAGE


class ChatChunks(Chunks):
    """``chat.completion.chunk`` events."""

    object_name = "chat.completion.chunk"
    before_text = b'"delta":{"content":'
    after_text = b'},"logprobs":'
    without_text = b'"delta":{},"logprobs":null,'

    def role(self, index: int) -> bytes:
        return b"".join(
            (
                self._opens[index],
                b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]',
                self._end,
            )
        )


class CompletionChunks(Chunks):
    """``text_completion`` events."""

    object_name = "text_completion"
    before_text = b'"text":'
    after_text = b',"logprobs":'
    without_text = b'"text":"","logprobs":null,'
