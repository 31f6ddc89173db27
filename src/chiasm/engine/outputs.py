"""From sampled tokens to outputs: text as it becomes certain, stop strings, and the end of an answer."""

from __future__ import annotations

from collections.abc import Sequence as AbstractSequence
from typing import NamedTuple

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from chiasm.engine.request import FinishReason, GenerateRequest, Output, RequestTiming, SamplingParams
from chiasm.engine.sampler import Sampled
from chiasm.engine.sequence import Sequence
from chiasm.models.base import Processor
from chiasm.wire import TokenLogprob

_MAX_HELD_TOKENS = 16
"""Tokens that are held back because they complete no character; a character has at most four bytes."""
_BROKEN = "\N{REPLACEMENT CHARACTER}"


class TextStep(NamedTuple):
    """Text that one token makes certain, and the stop string that it completes, if any."""

    text: str
    stop: str | None


class Detokenizer:
    """The text of one growing answer. Holds back incomplete characters and text that may become a stop string.

    The pieces add up to what the tokenizer makes of all tokens. There an incomplete character is U+FFFD, which may as well be
    what a token says: so what ends with it is held back too, until the next token or the end.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, prompt_token_ids: list[int]) -> None:
        # The last tokens of the prompt decide whether the first of the answer begins with a space.
        before = _whole(tokenizer, prompt_token_ids[-8:], skip_special_tokens=params.skip_special_tokens)
        self._stream = DecodeStream(before, skip_special_tokens=params.skip_special_tokens)
        self._held: list[int] = []
        """Tokens since the last that completed a character."""
        self._tokenizer = tokenizer
        self._params = params
        self._num_tokens = 0
        self._longest = max((len(stop) for stop in params.stop), default=0)
        self._pending = ""

    def add(self, token_id: int) -> TextStep:
        """Return the text that this token makes certain. Stop strings count only beyond ``min_tokens``."""
        self._num_tokens += 1
        self._pending += self._decode(token_id)
        return self._take_certain(self._held_back())

    def finish(self) -> TextStep:
        """Return the text that was held back, up to a stop string in it, when the answer ends with the last token."""
        self._pending += self._decode_held()
        return self._take_certain(0)

    def _take_certain(self, held_back: int) -> TextStep:
        """Take the text up to a stop string, or all but the last ``held_back`` characters."""
        if self._num_tokens > self._params.min_tokens:
            found = [(position, stop) for stop in self._params.stop if (position := self._pending.find(stop)) >= 0]
            if found:
                position, stop = min(found)
                kept = len(stop) if self._params.include_stop_str_in_output else 0
                return self._take(position + kept, stop)
        return self._take(len(self._pending) - held_back, None)

    def _decode(self, token_id: int) -> str:
        text = self._step(token_id)
        if text:
            self._held.clear()
            return text
        self._held.append(token_id)  # the stream decodes all of them again with each token
        if len(self._held) < _MAX_HELD_TOKENS:
            return ""
        before = self._held[-8:]
        text = self._decode_held()
        skip = self._params.skip_special_tokens
        self._stream = DecodeStream([] if text.endswith(_BROKEN) else before, skip_special_tokens=skip)
        return text

    def _decode_held(self) -> str:
        """Return the text of the tokens that completed no character, and hold them no longer."""
        held, self._held = self._held, []
        return self._tokenizer.decode(held, skip_special_tokens=self._params.skip_special_tokens)

    def _step(self, token_id: int) -> str:
        try:
            return self._stream.step(self._tokenizer, token_id) or ""
        except Exception:  # tokenizers raises a bare Exception if this token changes how earlier ones decode
            self._stream = DecodeStream(skip_special_tokens=self._params.skip_special_tokens)
            return self._decode_held() + (self._stream.step(self._tokenizer, token_id) or "")

    def _held_back(self) -> int:
        """Return the length of the longest suffix of the text that begins a stop string."""
        for length in range(min(self._longest - 1, len(self._pending)), 0, -1):
            if any(stop.startswith(self._pending[-length:]) for stop in self._params.stop):
                return length
        return 0

    def _take(self, length: int, stop: str | None) -> TextStep:
        text, self._pending = self._pending[:length], self._pending[length:]
        return TextStep(text, stop)


def _whole(tokenizer: Tokenizer, token_ids: list[int], *, skip_special_tokens: bool) -> list[int]:
    """Return the first of these tokens, without those at the end that complete no character: after them, a stream would give
    out the text of all."""
    count = len(token_ids)
    while tokenizer.decode(token_ids[:count], skip_special_tokens=skip_special_tokens).endswith(_BROKEN):
        count -= 1
    return token_ids[:count]


class _Addition(NamedTuple):
    """What one token adds to a choice: text, and the reason if the answer ends with it."""

    text: str
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class Choice:
    """One continuation of a request: makes outputs of its tokens, and finds where it ends."""

    def __init__(
        self,
        request: GenerateRequest,
        sequence: Sequence,
        timing: RequestTiming,
        *,
        processor: Processor,
        max_model_len: int,
    ) -> None:
        self.sequence = sequence
        self.done = False
        """Whether the engine has sent its last output."""
        self._request = request
        self._timing = timing
        self._eos_token_ids = processor.eos_token_ids
        self._max_model_len = max_model_len
        self._detokenizer = Detokenizer(processor.tokenizer, request.sampling, request.prompt.token_ids)

    def output(self, sampled: Sampled) -> Output:
        """Return the output for the token that a step sampled."""
        addition = self._add(sampled.token_id, self.sequence.num_output)
        logprobs = None if sampled.logprobs is None else (sampled.logprobs,)
        return self._output((sampled.token_id,), addition, logprobs)

    def resume(self) -> list[Output]:
        """Return outputs for the tokens that came with the request: one for those that the client has, one for the rest."""
        params = self._request.kv_transfer_params
        assert params is not None
        additions: list[_Addition] = []
        for number, token_id in enumerate(params.output_token_ids, start=1):
            additions.append(self._add(token_id, number))
            if additions[-1].finish_reason is not None:
                break
        token_ids, num_sent = tuple(params.output_token_ids[: len(additions)]), params.num_sent
        outputs: list[Output] = []
        if num_sent:
            sent = _Addition("".join(addition.text for addition in additions[:num_sent]))
            outputs.append(self._output(token_ids[:num_sent], sent, already_sent=True))
        rest = additions[-1]._replace(text="".join(addition.text for addition in additions[num_sent:]))
        if len(token_ids) > num_sent or rest.finish_reason is not None:
            logprobs = tuple(params.output_logprobs[num_sent : len(token_ids)]) if params.output_logprobs else None
            outputs.append(self._output(token_ids[num_sent:], rest, logprobs))
        return outputs

    def _add(self, token_id: int, number: int) -> _Addition:
        """Add output token ``number``, counted from 1. Each is added once, in order."""
        params = self._request.sampling
        is_eos = token_id in self._eos_token_ids and not params.ignore_eos
        is_stop = number >= params.min_tokens and (is_eos or token_id in params.stop_token_ids)
        is_last = is_stop or number >= params.max_tokens or self.sequence.num_prompt + number >= self._max_model_len
        text, stop = TextStep("", None)
        if not is_stop or params.include_stop_str_in_output:
            text, stop = self._detokenizer.add(token_id)
        if is_last and stop is None:
            rest, stop = self._detokenizer.finish()
            text += rest
        if stop is not None:
            return _Addition(text, "stop", stop)
        if is_stop:
            return _Addition(text, "stop", None if is_eos else token_id)
        return _Addition(text, "length" if is_last else None)

    def _output(
        self,
        token_ids: AbstractSequence[int],
        addition: _Addition,
        logprobs: tuple[TokenLogprob, ...] | None = None,
        *,
        already_sent: bool = False,
    ) -> Output:
        params = self._request.kv_transfer_params
        begun_elsewhere = params is not None and (params.do_remote_prefill or bool(params.output_token_ids))
        return Output(
            index=self.sequence.index,
            token_ids=tuple(token_ids),
            text=addition.text,
            logprobs=logprobs,
            finish_reason=addition.finish_reason,
            stop_reason=addition.stop_reason,
            timing=self._timing,
            num_cached_tokens=params.cached_tokens if params and begun_elsewhere else self.sequence.num_cached,
            already_sent=already_sent,
        )
