"""Log probabilities in the two shapes that OpenAI has for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from chiasm.server.protocol import ChatLogprob, ChatLogprobs, CompletionLogprobs, TopLogprob

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from chiasm.wire import TokenLogprob


def chat_logprobs(tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob]) -> ChatLogprobs:
    """For a chat: one entry a token."""
    return ChatLogprobs([_chat_logprob(tokenizer, entry) for entry in logprobs])


def _chat_logprob(tokenizer: Tokenizer, entry: TokenLogprob) -> ChatLogprob:
    token = token_text(tokenizer, entry.token_id)
    return ChatLogprob(
        token=token,
        logprob=entry.logprob,
        bytes=list(token.encode()),
        top_logprobs=[
            TopLogprob(token=text, logprob=logprob, bytes=list(text.encode()))
            for text, logprob in ((token_text(tokenizer, token_id), logprob) for token_id, logprob in entry.top)
        ],
    )


def completion_logprobs(
    tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob], text_offset: int
) -> CompletionLogprobs:
    """For a text completion; ``text_offset`` is the number of characters before the first of these tokens."""
    result = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for entry in logprobs:
        token = token_text(tokenizer, entry.token_id)
        result.tokens.append(token)
        result.token_logprobs.append(entry.logprob)
        result.top_logprobs.append({token_text(tokenizer, token_id): logprob for token_id, logprob in entry.top})
        result.text_offset.append(text_offset)
        text_offset += len(token)
    return result


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """A token by itself; a part of a character shows as U+FFFD."""
    text: str = tokenizer.decode([token_id], skip_special_tokens=False)
    return text
