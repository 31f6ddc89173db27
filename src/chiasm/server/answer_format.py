"""The JSON of answers: bodies and stream events of both endpoints.

What all events of a stream have in common is encoded once; for each token only its text is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import msgspec

from chiasm.http import events
from chiasm.models.token_bytes import token_bytes_of
from chiasm.server.protocol import (
    AssistantMessage,
    ChatChoice,
    ChatLogprob,
    ChatLogprobs,
    CompletionChoice,
    CompletionLogprobs,
    Response,
    TopLogprob,
    Usage,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from chiasm.engine.request import FinishReason
    from chiasm.server.generation import ChoiceState
    from chiasm.wire import KVTransferParams, TokenLogprob

_encode = msgspec.json.Encoder().encode
_TOKENS_AT_ONCE = 32
"""Writing so many tokens with all their candidates takes about a millisecond."""
_USAGE_TO_COME = b',"usage":null}\n\n'
_NO_USAGE = b"}\n\n"


class _Head(msgspec.Struct):
    """The fields that all chunks of a stream begin with."""

    id: str
    object: str
    created: int
    model: str


class AnswerFormat(ABC):
    """One answer of one endpoint."""

    id_prefix: ClassVar[str]
    object: ClassVar[Literal["chat.completion", "text_completion"]]
    chunk_object: ClassVar[str]
    before_text: ClassVar[bytes]
    """What a chunk has between the index and the text of its choice."""
    after_text: ClassVar[bytes]
    """What a chunk has between the text and the log probabilities."""
    without_text: ClassVar[bytes]
    """What the last chunk of a choice has in place of both and the text."""

    def __init__(
        self,
        request_id: str,
        created: int,
        model: str,
        tokenizer: Tokenizer,
        *,
        num_choices: int,
        has_logprobs: bool,
        skip_special_tokens: bool,
        announces_usage: bool,
    ) -> None:
        """``created`` is a Unix time. ``announces_usage``: every chunk has the field ``usage``, null but in the last."""
        self._id = f"{self.id_prefix}-{request_id}"
        self.created = created
        self._model = model
        self._token_bytes = token_bytes_of(tokenizer)
        self._skip_special_tokens = skip_special_tokens
        self._has_logprobs = has_logprobs
        self._head = _encode(_Head(self._id, self.chunk_object, created, model))[:-1] + b',"choices":['
        self._opens = [b'data: %s{"index":%d,' % (self._head, index) for index in range(num_choices)]
        self._end = _USAGE_TO_COME if announces_usage else _NO_USAGE

    # ---- one body ----------------------------------------------------------------------------------------------------

    def body(self, choices: Sequence[ChoiceState], usage: Usage, handle: KVTransferParams | None) -> bytes:
        """Return the whole answer, with the handle with which it continues elsewhere, if it does.

        May take long, but no step of it holds the interpreter for more than a few milliseconds, so call it in a thread.
        """
        response = Response(
            id=self._id,
            object=self.object,
            created=self.created,
            model=self._model,
            choices=[],
            usage=usage,
            kv_transfer_params=handle or msgspec.UNSET,
        )
        # JSON escapes quotes in texts, so neither mark is found in one.
        head, mark, tail = _encode(response).partition(b'"choices":[')
        pieces = [head, mark]
        for index, choice in enumerate(choices):
            before, name, after = _encode(self.choice(index, choice)).rpartition(b'"logprobs":null')
            pieces += (b"," if index else b"", before)
            if self._has_logprobs:
                pieces += (b'"logprobs":', *self._logprobs_pieces(choice.logprobs, choice.text_offsets), after)
            else:
                pieces += (name, after)
        return b"".join([*pieces, tail])

    @abstractmethod
    def choice(self, index: int, choice: ChoiceState) -> ChatChoice | CompletionChoice:
        """Return a complete choice, without its log probabilities."""

    @abstractmethod
    def logprobs(
        self, logprobs: Sequence[TokenLogprob], text_offsets: Sequence[int]
    ) -> ChatLogprobs | CompletionLogprobs:
        """Return the log probabilities of some tokens of a choice, with the characters that come before each."""

    def _logprobs_pieces(self, logprobs: Sequence[TokenLogprob], text_offsets: Sequence[int]) -> Iterator[bytes]:
        """Yield the JSON of the log probabilities of a choice, column by column, each made of few tokens at a time."""
        columns: dict[str, list[bytes]] = {}
        for start in range(0, max(1, len(logprobs)), _TOKENS_AT_ONCE):
            end = start + _TOKENS_AT_ONCE
            some = self.logprobs(logprobs[start:end], text_offsets[start:end])
            for name in some.__struct_fields__:
                columns.setdefault(name, []).append(_encode(getattr(some, name))[1:-1])
        for number, (name, written) in enumerate(columns.items()):
            yield b'%b"%b":[' % (b"," if number else b"{", name.encode())
            yield b",".join(written)
            yield b"]"
        yield b"}"

    def written_logprobs(self, logprobs: Sequence[TokenLogprob] | None, text_offsets: Sequence[int]) -> bytes:
        """Return the same as JSON; ``null`` if there are none."""
        return b"null" if logprobs is None else _encode(self.logprobs(logprobs, text_offsets))

    # ---- a stream ----------------------------------------------------------------------------------------------------

    def role(self, index: int) -> bytes:
        """Return the event that comes before the text of a choice, if there is one."""
        return b""

    def text(
        self,
        index: int,
        text: str,
        logprobs: Sequence[TokenLogprob] | None,
        text_offsets: Sequence[int],
        usage: Usage | None,
    ) -> bytes:
        """Return an event with more text of a choice."""
        written = self.written_logprobs(logprobs, text_offsets)
        head, ending = self._opens[index], self._ending(usage)
        return b'%b%b%b%b%b,"finish_reason":null}]%b' % (
            head,
            self.before_text,
            _encode(text),
            self.after_text,
            written,
            ending,
        )

    def skip(self, index: int, text: str) -> None:  # noqa: B027  # most formats don't care
        """Take note of text that the client has, because the answer began elsewhere."""

    def finish(self, index: int, reason: FinishReason, stop_reason: int | str | None, usage: Usage | None) -> bytes:
        """Return the last event of a choice, and before it what was held back."""
        return self._last_event(index, reason, stop_reason, usage)

    def _last_event(
        self, index: int, reason: str, stop_reason: int | str | None, usage: Usage | None, rest: bytes = b""
    ) -> bytes:
        """``rest`` stands in place of ``without_text`` if it has text that was held back."""
        head, ending = self._opens[index] + (rest or self.without_text), self._ending(usage)
        return b'%b"finish_reason":%b,"stop_reason":%b}]%b' % (head, _encode(reason), _encode(stop_reason), ending)

    def usage(self, usage: Usage) -> bytes:
        """Return the event with the usage, which has no choices."""
        return events.event(self._head + b'],"usage":' + _encode(usage) + b"}")

    def _ending(self, usage: Usage | None) -> bytes:
        return self._end if usage is None else b',"usage":' + _encode(usage) + _NO_USAGE


class ChatFormat(AnswerFormat):
    """``chat.completion`` and ``chat.completion.chunk``."""

    id_prefix = "chatcmpl"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    before_text = b'"delta":{"content":'
    after_text = b'},"logprobs":'
    without_text = b'"delta":{},"logprobs":null,'

    def choice(self, index: int, choice: ChoiceState) -> ChatChoice:
        assert choice.finish_reason is not None
        return ChatChoice(
            index=index,
            message=AssistantMessage("".join(choice.text)),
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
        )

    def logprobs(self, logprobs: Sequence[TokenLogprob], text_offsets: Sequence[int]) -> ChatLogprobs:
        return ChatLogprobs([self._logprob(entry) for entry in logprobs])

    def _logprob(self, entry: TokenLogprob) -> ChatLogprob:
        return ChatLogprob(
            token=self._token_bytes.text(entry.token_id),
            logprob=entry.logprob,
            bytes=self._bytes(entry.token_id),
            top_logprobs=[
                TopLogprob(token=self._token_bytes.text(token_id), logprob=logprob, bytes=self._bytes(token_id))
                for token_id, logprob in entry.top
            ],
        )

    def _bytes(self, token_id: int) -> list[int]:
        return list(self._token_bytes.of(token_id, skip_special_tokens=self._skip_special_tokens))

    def role(self, index: int) -> bytes:
        delta = b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'
        return self._opens[index] + delta + self._end


class CompletionFormat(AnswerFormat):
    """``text_completion``."""

    id_prefix = "cmpl"
    object = "text_completion"
    chunk_object = "text_completion"
    before_text = b'"text":'
    after_text = b',"logprobs":'
    without_text = b'"text":"","logprobs":null,'

    def choice(self, index: int, choice: ChoiceState) -> CompletionChoice:
        assert choice.finish_reason is not None
        return CompletionChoice(
            index=index,
            text="".join(choice.text),
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
        )

    def logprobs(self, logprobs: Sequence[TokenLogprob], text_offsets: Sequence[int]) -> CompletionLogprobs:
        text = self._token_bytes.text
        return CompletionLogprobs(
            tokens=[text(entry.token_id) for entry in logprobs],
            token_logprobs=[entry.logprob for entry in logprobs],
            top_logprobs=[self._candidates(entry) for entry in logprobs],
            text_offset=list(text_offsets),
        )

    def _candidates(self, entry: TokenLogprob) -> dict[str, float]:
        """Return the sampled token and the likeliest ones: as in OpenAI's API, that may be one more than was asked for."""
        text = self._token_bytes.text
        sampled = {text(entry.token_id): entry.logprob}
        return sampled | {text(token_id): logprob for token_id, logprob in entry.top} | sampled
