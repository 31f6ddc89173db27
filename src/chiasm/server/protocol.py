"""The bodies of requests and responses: the part of OpenAI's API that an instance supports, with vLLM's extensions.

Types are checked here, values where they are used. Unknown fields are ignored, as by other servers of this API; known fields
that would change the answer but are not supported are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import msgspec

from chiasm.engine.request import FinishReason
from chiasm.errors import InvalidRequestError
from chiasm.http.untrusted import read_json
from chiasm.wire import ECItem, Integer, KVTransferParams

# ---- requests --------------------------------------------------------------------------------------------------------


class StreamOptions(msgspec.Struct):
    """What a stream contains besides text."""

    include_usage: bool | None = False
    """A last chunk has the usage."""
    continuous_usage_stats: bool | None = False
    """Every chunk has the usage so far."""


class Unsupported(msgspec.Struct):
    """Fields that would change the answer and are not supported."""

    allowed_token_ids: Any = None
    audio: Any = None
    bad_words: Any = None
    best_of: Any = None
    chat_template: Any = None
    documents: Any = None
    echo: Any = None
    function_call: Any = None
    functions: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    length_penalty: Any = None
    logits_processors: Any = None
    logprob_token_ids: Any = None
    mm_processor_kwargs: Any = None
    modalities: Any = None
    prompt_embeds: Any = None
    prompt_logprobs: Any = None
    repetition_detection: Any = None
    return_token_ids: Any = None
    return_tokens_as_token_ids: Any = None
    spaces_between_special_tokens: Any = None
    suffix: Any = None
    thinking_token_budget: Any = None
    truncate_prompt_tokens: Any = None
    use_beam_search: Any = None
    watermarking: Any = None
    web_search_options: Any = None


_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "function_call": ("none", "auto"),
    "length_penalty": (0.0, 1.0),
    "modalities": (["text"],),
    "spaces_between_special_tokens": (True,),
}
"""Values of ``Unsupported`` fields that change nothing and are accepted, as are null, false, and what is empty."""


_INSTEAD = {
    "function_call": "tool_choice",
    "functions": "tools",
    "guided_choice": "structured_outputs",
    "guided_grammar": "structured_outputs",
    "guided_json": "structured_outputs",
    "guided_regex": "structured_outputs",
}
"""What has replaced a field of ``Unsupported``."""


class JsonSchema(msgspec.Struct):
    """A JSON schema that the answer follows."""

    schema: Any = None
    strict: bool | None = None
    """Whether a schema that can't be enforced whole is refused."""


class ResponseFormat(msgspec.Struct):
    """OpenAI's way to ask for structured output: ``text``, ``json_object`` or ``json_schema``."""

    type: str
    json_schema: JsonSchema | None = None


class StructuredOutputs(msgspec.Struct):
    """vLLM's way to ask for structured output; one of the first five, and what isn't supported of the others."""

    json: Any = None
    """A JSON schema, as an object or as JSON in a string."""
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool | None = None
    structural_tag: Any = None
    whitespace_pattern: Any = None


class GenerationFields(Unsupported, kw_only=True):
    """Fields of both chat and text completions; None if the client left them out."""

    model: str | None = None
    add_special_tokens: bool | None = None
    """Whether the tokenizer adds those of its own to a text, such as BOS. In chats the template writes them."""
    max_tokens: Integer | None = None
    min_tokens: Integer | None = None
    n: Integer | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Integer | None = None
    min_p: float | None = None
    seed: Integer | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[Integer, float] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Integer] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    cache_salt: str | None = None
    kv_transfer_params: KVTransferParams | None = None
    """What the proxy sends to prefill and decode instances; the others refuse it."""


class ImageURL(msgspec.Struct):
    """The URL of an image: ``data:``, ``http:``, ``https:`` or ``file:``."""

    url: str


class Part(msgspec.Struct):
    """One part of a message's content; ``type`` says which other fields are used."""

    type: str
    text: str | None = None
    image_url: ImageURL | str | None = None
    image_embeds: Any = None
    """Metadata that sizes the placeholders of an image whose embedding an encoder publishes under ``uuid``."""
    uuid: str | None = None


class CalledFunction(msgspec.Struct):
    """A tool and what it is called with."""

    name: str
    arguments: str | dict[str, Any] | None = None
    """A JSON object, as a rule in a string; None is an empty one."""


class CallInMessage(msgspec.Struct):
    """A call that the assistant made earlier in the chat."""

    function: CalledFunction
    id: str | None = None
    type: str | None = None


class ChatMessage(msgspec.Struct):
    """One message of a chat."""

    role: str
    content: str | list[Part] | None = None
    name: str | None = None
    reasoning: str | None = None
    """What the assistant thought before it answered; templates of models that reason may show it."""
    reasoning_content: str | None = None
    """An older name for it, which many clients still use."""
    tool_calls: list[CallInMessage] | None = None
    tool_call_id: str | None = None


class ChatRequest(GenerationFields, kw_only=True):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage]
    tools: list[dict[str, Any]] | None = None
    """Given to the chat template as they are."""
    tool_choice: Any = None
    """``none``, ``auto``, ``required``, one tool, or the tools that are allowed."""
    parallel_tool_calls: bool | None = None
    max_completion_tokens: Integer | None = None
    logprobs: bool | None = None
    top_logprobs: Integer | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    """Told to the chat template; those of models that don't reason ignore it."""


class CompletionRequest(GenerationFields, kw_only=True):
    """Body of POST /v1/completions."""

    prompt: str | list[str | Integer | list[Integer]]
    """Text, several texts, token ids, or several lists of token ids."""
    logprobs: Integer | None = None


_Request = TypeVar("_Request", bound=GenerationFields)


def decode(decoder: msgspec.json.Decoder[_Request], body: bytes) -> _Request:
    """Return the request in a body. Raises InvalidRequestError that names the wrong field."""
    request = read_json(decoder, body)
    _refuse_unsupported(request)
    if request.stream_options is not None and not request.stream:
        raise InvalidRequestError("stream_options needs stream=true.", param="stream_options")
    return request


def _refuse_unsupported(request: Unsupported) -> None:
    for name in Unsupported.__struct_fields__:
        value = getattr(request, name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)  # 0 is one, too
        if (value or is_number) and value not in _WITHOUT_EFFECT.get(name, ()):
            raise unsupported(name)


def unsupported(name: str) -> InvalidRequestError:
    """Return the error for a field that would change the answer and is not supported."""
    instead = f"send {_INSTEAD[name]} in its place" if name in _INSTEAD else "leave it out"
    return InvalidRequestError(
        f"{name} is not supported by the built-in engine; {instead}, or serve the model with --engine vllm.", param=name
    )


# ---- responses -------------------------------------------------------------------------------------------------------


class PromptTokensDetails(msgspec.Struct):
    """How many tokens of the prompt did not have to be computed."""

    cached_tokens: int
    """Found in the prefix cache."""


class Usage(msgspec.Struct):
    """Tokens of one HTTP request, over all its prompts and choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(msgspec.Struct):
    """One candidate for a token."""

    token: str
    """Its text alone, in which an incomplete character is U+FFFD."""
    logprob: float
    bytes: list[int]
    """What it adds to the text: the bytes of all tokens join to it. A special token that the text leaves out has none."""


class ChatLogprob(msgspec.Struct):
    """A sampled token and the likeliest candidates."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    """Log probabilities of the tokens of a choice or a chunk."""

    content: list[ChatLogprob]


class CompletionLogprobs(msgspec.Struct):
    """Log probabilities of the tokens of a choice or a chunk, as parallel lists."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    """The likeliest candidates, and the token that was sampled."""
    text_offset: list[int]


class FunctionCall(msgspec.Struct):
    """The tool that an answer calls, and its arguments as JSON."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct):
    """One call in an answer."""

    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class AssistantMessage(msgspec.Struct):
    """The text of a choice, or what it calls."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    tool_calls: list[ToolCall] | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(msgspec.Struct):
    """One answer to a chat."""

    index: int
    message: AssistantMessage
    finish_reason: FinishReason | Literal["tool_calls"]
    logprobs: ChatLogprobs | None = None
    stop_reason: int | str | None = None


class CompletionChoice(msgspec.Struct):
    """One continuation of a prompt."""

    index: int
    text: str
    finish_reason: FinishReason
    logprobs: CompletionLogprobs | None = None
    stop_reason: int | str | None = None


class Response(msgspec.Struct, kw_only=True):
    """Response of both endpoints."""

    id: str
    object: Literal["chat.completion", "text_completion"]
    created: int
    model: str
    choices: Sequence[ChatChoice | CompletionChoice]
    usage: Usage
    ec_transfer_params: dict[str, ECItem] | msgspec.UnsetType = msgspec.UNSET
    """The embeddings that an encoder has published, by identifier."""
    kv_transfer_params: KVTransferParams | msgspec.UnsetType = msgspec.UNSET
    """The handle with which a decode instance continues the answer of a prefill instance."""
