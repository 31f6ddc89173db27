"""From messages or text to prompts that the engine can run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, TypeVar

from chiasm.errors import InvalidRequestError
from chiasm.models.base import ItemGeometry, Message, Prompt
from chiasm.server.exchange import Exchange
from chiasm.server.protocol import ChatMessage, ChatRequest, CompletionRequest

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from chiasm.engine.engine import LanguageEngine

_T = TypeVar("_T")
INLINE_BYTES = 8 << 10
"""A body up to this size is tokenized in less time than a thread takes to be woken on a busy machine."""
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
"""Roles of OpenAI's API as chat templates know them."""


def check_messages(request: ChatRequest, max_messages: int) -> None:
    """Raise InvalidRequestError unless there are messages, not too many, of known roles."""
    if not request.messages:
        raise InvalidRequestError("messages is empty; send at least one.", param="messages")
    if len(request.messages) > max_messages:
        raise InvalidRequestError(
            f"There are {len(request.messages)} messages and {max_messages} is the limit.", param="messages"
        )
    for index, message in enumerate(request.messages):
        if message.role not in _ROLES:
            raise InvalidRequestError(
                f"messages[{index}].role must be one of {', '.join(_ROLES)}, got {message.role[:50]!r}.",
                param="messages",
            )


async def chat_prompt(
    exchange: Exchange, engine: LanguageEngine, request: ChatRequest, items: Sequence[tuple[str, ItemGeometry]]
) -> Prompt:
    """Render and tokenize a chat; ``items`` are its images in order. Raises InvalidRequestError."""
    continue_final = bool(request.continue_final_message)
    if continue_final and request.add_generation_prompt:
        raise InvalidRequestError(
            "continue_final_message and add_generation_prompt exclude each other.", param="continue_final_message"
        )
    messages = [_template_message(message) for message in request.messages]
    characters = sum(len(text) for message in request.messages for text in _texts(message))

    def build() -> Prompt:
        _check_length(engine, characters, "messages")
        return engine.processor.build_chat(
            messages,
            items,
            add_generation_prompt=not continue_final and request.add_generation_prompt is not False,
            continue_final_message=continue_final,
            template_kwargs=request.chat_template_kwargs,
        )

    return _checked(engine, await _apart_if_long(exchange, build), "messages")


async def completion_prompts(exchange: Exchange, engine: LanguageEngine, request: CompletionRequest) -> list[Prompt]:
    """The prompts of a text completion. Raises InvalidRequestError."""
    given = _given_prompts(request, exchange.instance.config.max_prompts)
    prompts: list[Prompt] = []
    for prompt in given:
        if isinstance(prompt, str):
            built = await _apart_if_long(exchange, partial(_text_prompt, engine, prompt))
        else:
            built = engine.processor.build_tokens(prompt)
        prompts.append(_checked(engine, built, "prompt"))
    return prompts


def _text_prompt(engine: LanguageEngine, text: str) -> Prompt:
    _check_length(engine, len(text), "prompt")
    return engine.processor.build_text(text)


async def _apart_if_long(exchange: Exchange, build: Callable[[], _T]) -> _T:
    return build() if len(exchange.body) <= INLINE_BYTES else await exchange.instance.in_thread(build)


def _check_length(engine: LanguageEngine, characters: int, param: str) -> None:
    """Refuse text that cannot fit the context before anybody spends time on its tokens."""
    if characters < engine.max_model_len:
        return
    at_least = characters // _longest_token(engine.processor.tokenizer)
    if at_least >= engine.max_model_len:
        raise _too_long(f"at least {at_least}", engine.max_model_len, param)


def _checked(engine: LanguageEngine, prompt: Prompt, param: str) -> Prompt:
    """The prompt, if it is not empty and leaves room for an answer. Raises InvalidRequestError."""
    if not prompt.token_ids:
        raise InvalidRequestError("The prompt is empty; send at least one token.", param=param)
    if len(prompt.token_ids) >= engine.max_model_len:
        raise _too_long(str(len(prompt.token_ids)), engine.max_model_len, param)
    return prompt


def _too_long(tokens: str, limit: int, param: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"The prompt has {tokens} tokens, and this model's context is {limit} tokens, answer included. "
        "Shorten the prompt, or send fewer or smaller images.",
        param=param,
        code="context_length_exceeded",
    )


@lru_cache(maxsize=2)
def _longest_token(tokenizer: Tokenizer) -> int:
    """Characters of the longest entry of the vocabulary: no text has fewer tokens than its length through this."""
    return max((len(token) for token in tokenizer.get_vocab()), default=1)


# ---- messages --------------------------------------------------------------------------------------------------------


def _template_message(message: ChatMessage) -> Message:
    """The message as chat templates expect it."""
    result: Message = {"role": _ROLES[message.role], "content": _template_content(message)}
    if message.name is not None:
        result["name"] = message.name
    if message.tool_call_id is not None:
        result["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        result["tool_calls"] = [_template_tool_call(call) for call in message.tool_calls]
    return result


def _template_content(message: ChatMessage) -> str | list[dict[str, str]]:
    if not isinstance(message.content, list):
        return message.content or ""
    return [
        {"type": "text", "text": part.text or ""} if part.type == "text" else {"type": "image"}
        for part in message.content
    ]


def _template_tool_call(call: dict[str, Any]) -> dict[str, Any]:
    """On the wire a call's arguments are JSON in a string; templates write them from an object."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _texts(message: ChatMessage) -> list[str]:
    if isinstance(message.content, list):
        return [part.text for part in message.content if part.text is not None]
    return [message.content] if message.content else []


# ---- prompts of text completions ---------------------------------------------------------------------------------------


def _given_prompts(request: CompletionRequest, max_prompts: int) -> list[str | list[int]]:
    given = request.prompt
    if isinstance(given, str):
        return [given]
    if given and all(isinstance(element, int) for element in given):
        return [given]  # type: ignore[list-item]
    if not given or len({type(element) for element in given}) > 1:
        raise InvalidRequestError(
            "prompt must be a string, a list of strings, a list of token ids, or a list of such lists; none is empty.",
            param="prompt",
        )
    if len(given) > max_prompts:
        raise InvalidRequestError(f"There are {len(given)} prompts and {max_prompts} is the limit.", param="prompt")
    return given  # type: ignore[return-value]
