"""Renders messages to text with the chat template of a checkpoint.

Templates differ in the content that they accept: some want a string, some a list of parts, and some silently drop what
they don't expect. Probes that are rendered when the template is loaded show what it accepts, whether it knows tools, and how
it writes calls.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from chiasm.errors import InvalidRequestError
from chiasm.models.base import Message
from chiasm.models.special_words import Disguise, SpecialWords
from chiasm.models.tool_format import HERMES, ToolFormat, described

Form = Literal["string", "parts"]
_PROBE = "a probe of the template"
_ROLES = ("user", "system", "assistant", "tool")
_TOOL_PROBE = "probe_of_the_template"
_ARGUMENT_PROBE = {"probe_of_arguments": 1}


class Rendered(NamedTuple):
    """A prompt as text."""

    text: str
    reveal: Callable[[str], str] | None
    """Uncovers the special words that came from the messages, which are text; None if there are none."""


class ChatTemplate:
    """Renders messages, with ``placeholder`` for each image part. ``template`` is None if the checkpoint has none.

    ``image_text`` has the placeholder, and stands for images where the template takes text alone.
    """

    def __init__(
        self, tokenizer: Any, template: str | None, placeholder: str, image_text: str, words: SpecialWords
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._placeholder = placeholder
        self._image_text = image_text
        self._words = words
        self._reserved = set(inspect.signature(tokenizer.apply_chat_template).parameters) - {"tools", "documents"}
        self._forms: dict[str, tuple[Form, ...]] = {}
        self._writes_placeholder = True
        self._knows_tools = False
        self._decodes_arguments = True
        """Whether calls are given to the template with their arguments as objects rather than as JSON in strings."""
        self.tool_format: ToolFormat | None = HERMES
        """How answers write calls; None if the template writes them in a form that isn't understood."""
        if template is not None:
            for role in _ROLES:
                self._forms[role] = tuple(form for form in ("parts", "string") if self._takes(role, form))
            self._writes_placeholder = self._takes_images()
            self._knows_tools = self._writes_tools()
            if self._knows_tools:
                self.tool_format = self._probed_format()

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool,
        continue_final_message: bool,
        template_kwargs: Mapping[str, Any],
    ) -> Rendered:
        """Return the prompt as text, with one placeholder per image part. Raises InvalidRequestError."""
        if self._template is None:
            raise InvalidRequestError("This model has no chat template. Use /v1/completions.", param="messages")
        if taken := sorted(self._reserved.intersection(template_kwargs)):
            raise InvalidRequestError(
                f"chat_template_kwargs must not set {', '.join(taken)}.", param="chat_template_kwargs"
            )
        options = {
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
            "continue_final_message": continue_final_message,
        }

        def rendered(hide: Callable[[str], str] | None = None) -> str:
            shown = messages if hide is None else _each_string(messages, hide)
            kwargs = template_kwargs if hide is None else _each_string(template_kwargs, hide)
            shown_tools = tools if hide is None else _each_string(tools, hide)
            if not self._knows_tools:
                shown = described(shown, shown_tools, has_system=bool(self._forms["system"]))
            elif shown_tools:
                kwargs = {**kwargs, "tools": shown_tools}
            return self._apply([self._adapted(message) for message in shown], {**options, **kwargs})

        try:
            texts = list(_strings([*messages, *tools, template_kwargs]))
        except RecursionError:
            raise _too_deep() from None
        if not self._words.may_come_of(texts):
            return Rendered(rendered(), None)
        # Templates look into messages, so no more is hidden from this one than necessary.
        disguise = Disguise(self._words, texts)
        bare = rendered(disguise.hide_beginnings)
        own_words = self._words.find(bare)
        for hide in (None, disguise.hide):
            text = rendered(hide)
            if self._words.find(text) == own_words:
                return Rendered(text, disguise.reveal if hide else None)
        return Rendered(bare, disguise.reveal)

    def _apply(self, messages: Sequence[Message], options: Mapping[str, Any]) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                messages, chat_template=self._template, tokenize=False, **options
            )
        except RecursionError:
            raise _too_deep() from None
        except Exception as error:  # a template is a program and can raise anything; the messages caused it
            raise InvalidRequestError(f"The chat template refuses the messages: {error}", param="messages") from error
        return str(text)

    def _adapted(self, message: Message) -> Message:
        """Return the message with its content in a form that the template accepts for its role."""
        if not isinstance(message, dict):
            raise InvalidRequestError("A message must be an object with role and content.", param="messages")
        content = message.get("content")
        forms = self._forms.get(str(message.get("role")), ())
        if isinstance(content, str):
            if forms == ("parts",):
                content = [{"type": "text", "text": content}]
        elif isinstance(content, list):
            parts = [self._adapted_part(part) for part in content]
            joined = "\n".join(part.get("text", self._image_text) for part in parts)
            content = joined if forms == ("string",) else parts
        elif content is not None:
            raise InvalidRequestError("A message's content must be a string or a list of parts.", param="messages")
        if self._decodes_arguments or not message.get("tool_calls"):
            return {**message, "content": content}
        return {**message, "content": content, "tool_calls": [_with_text(call) for call in message["tool_calls"]]}

    def _adapted_part(self, part: object) -> Message:
        match part:
            case {"type": "image"}:
                return {"type": "image"} if self._writes_placeholder else _text_part(self._image_text)
            case {"type": "text", "text": str(text)}:
                return _text_part(text)
        raise InvalidRequestError("A message's parts must be text or images.", param="messages")

    def _takes(self, role: str, form: Form) -> bool:
        """Whether the template renders content of this form correctly for this role."""
        probe = _probe(role, _PROBE if form == "string" else [_text_part(_PROBE)])
        user = _probe("user", "x" if self._forms.get("user") == ("string",) else [_text_part("x")])
        conversation = [probe, user] if role == "system" else [probe] if role == "user" else [user, probe]
        try:
            text = self._apply(conversation, {})
        except InvalidRequestError:
            return False
        # A template that expects a string prints a list of parts as Python or JSON.
        return _PROBE in text and "'type'" not in text and '"type"' not in text

    def _writes_tools(self) -> bool:
        """Whether the template shows the model tools that come with the messages."""
        function = {"name": _TOOL_PROBE, "description": "", "parameters": {"type": "object", "properties": {}}}
        try:
            text = self._apply(
                [self._adapted(_probe("user", "x"))], {"tools": [{"type": "function", "function": function}]}
            )
        except InvalidRequestError:
            return False
        return _TOOL_PROBE in text

    def _probed_format(self) -> ToolFormat | None:
        """Return how the template writes calls, and so how the model was trained to; None if that isn't understood."""
        for self._decodes_arguments in (True, False):
            if (found := self._format_of_calls()) is not None:
                return found
        self._decodes_arguments = True
        return None

    def _format_of_calls(self) -> ToolFormat | None:
        call = {"id": "probe", "type": "function", "function": {"name": _TOOL_PROBE, "arguments": _ARGUMENT_PROBE}}
        try:
            text, one, two = [
                self._apply([self._adapted(_probe("user", "x")), self._adapted(answer)], {})
                for answer in (
                    _probe("assistant", _PROBE),
                    {**_probe("assistant", ""), "tool_calls": [call]},
                    {**_probe("assistant", ""), "tool_calls": [call, call]},
                )
            ]
        except InvalidRequestError:
            return None
        before, _, after = text.partition(_PROBE)
        if not (one.startswith(before) and two.startswith(before) and one.endswith(after) and two.endswith(after)):
            return None
        written = one[len(before) : len(one) - len(after)]
        both = two[len(before) : len(two) - len(after)]
        between = both[len(written) : len(both) - len(written)]
        begin, brace, rest = written.partition("{")
        try:
            function, length = json.JSONDecoder().raw_decode(brace + rest)
        except ValueError:
            return None
        if both != written + between + written or between.strip() or not begin.strip():
            return None
        for key in ("arguments", "parameters"):
            if list(function.items()) == [("name", _TOOL_PROBE), (key, _ARGUMENT_PROBE)]:
                end = (brace + rest)[length:]
                found = ToolFormat(begin, end, between, key) if end.strip() else None
                # The words of special tokens don't occur in the text of answers.
                return None if self._words.find(begin + end) else found
        return None

    def _takes_images(self) -> bool:
        """Whether the template writes the placeholder for an image part."""
        try:
            text = self._apply([_probe("user", [{"type": "image"}, _text_part(_PROBE)])], {})
        except InvalidRequestError:
            return False
        return text.count(self._placeholder) == 1


def _too_deep() -> InvalidRequestError:
    return InvalidRequestError(
        "The values in messages or chat_template_kwargs are nested too deeply.", param="messages"
    )


def _probe(role: str, content: str | list[Message]) -> Message:
    return {"role": role, "content": content}


def _with_text(call: Message) -> Message:
    """Return the call with its arguments as JSON in a string."""
    function = call["function"]
    arguments = function["arguments"]
    if isinstance(arguments, str):
        return call
    return {**call, "function": {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}}


def _text_part(text: str) -> Message:
    return {"type": "text", "text": text}


def _strings(value: object) -> Iterator[str]:
    """Yield every string in nested lists and mappings; of a text part only its text, as a template writes it."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping) and value.keys() == {"type", "text"}:
        yield from _strings(value["text"])
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


def _each_string(value: Any, change: Callable[[str], str]) -> Any:
    """Return nested lists and mappings with every string changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_each_string(key, change): _each_string(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_each_string(item, change) for item in value]
    return value
