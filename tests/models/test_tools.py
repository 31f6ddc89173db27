"""What a chat template makes of tools, and how it says that answers call them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chiasm.models import load_processor
from chiasm.models.base import Message, Processor
from chiasm.models.tool_format import HERMES, ToolFormat
from tests.models.conftest import Loaded

TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
USER: Message = {"role": "user", "content": "How is it in Oslo?"}
CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Osló"}}}],
}
RESULT: Message = {"role": "tool", "tool_call_id": "1", "content": "Rain."}
WRITTEN = '<tool_call>\n{"name": "weather", "arguments": {"city": "Osló"}}\n</tool_call>'

KNOWS_TOOLS = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}CALLS\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
WITHOUT_SYSTEM = (
    "{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate.') }}{% endif %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
)


@pytest.fixture
def templated(checkpoint: Callable[[str], Loaded], tmp_path: Path) -> Callable[[str], Processor]:
    """A processor with another chat template."""

    def make(template: str) -> Processor:
        folder = shutil.copytree(checkpoint("llava").folder, tmp_path / "templated")
        (folder / "chat_template.jinja").write_text(template)
        return load_processor(folder)

    return make


def _text(processor: Processor, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> str:
    token_ids = processor.build_chat(messages, [], tools=tools or []).token_ids
    text: str = processor.tokenizer.decode(token_ids, skip_special_tokens=False)
    return text


def _calls(code: str) -> str:
    return KNOWS_TOOLS.replace("CALLS", "{% for call in message.tool_calls %}" + code + "{% endfor %}")


def test_a_template_that_knows_tools_gets_them_and_shows_how_they_are_called(
    checkpoint: Callable[[str], Loaded],
) -> None:
    processor = checkpoint("qwen3_vl").processor
    assert processor.tool_format == HERMES
    text = _text(processor, [USER, CALL], [TOOL])
    assert json.dumps(TOOL) in text
    assert WRITTEN in text
    assert "# Tools" not in text


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (
            '<call>{"name": "{{ call.function.name }}", "parameters": {{ call.function.arguments | tojson }}}</call>',
            ToolFormat("<call>", "</call>", "", "parameters"),
        ),
        (
            "{% if not loop.first %}{{ '\\n' }}{% endif %}"
            """<call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments }}}</call>""",
            ToolFormat("<call>", "</call>", "\n"),
        ),
        ("{{ call.function.name }}({{ call.function.arguments | tojson }})", None),
        ('{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}', None),
        ('</s>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</s>', None),
    ],
    ids=["parameters", "arguments as strings", "no JSON", "no words around it", "special tokens"],
)
def test_the_format_of_calls_is_that_of_the_template(
    templated: Callable[[str], Processor], code: str, expected: ToolFormat | None
) -> None:
    assert templated(_calls(code)).tool_format == expected


def test_arguments_are_given_as_the_template_expects_them(templated: Callable[[str], Processor]) -> None:
    code = """<call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments }}}</call>"""
    text = _text(templated(_calls(code)), [USER, CALL], [TOOL])
    assert '<call>{"name": "weather", "arguments": {"city": "Osló"}}</call>' in text


def test_a_template_without_tools_gets_them_in_words(checkpoint: Callable[[str], Loaded]) -> None:
    processor = checkpoint("qwen2_5_vl").processor
    assert processor.tool_format == HERMES
    system: Message = {"role": "system", "content": "Be brief."}
    text = _text(processor, [system, USER, CALL, RESULT, RESULT], [TOOL])
    before, _, after = text.partition(f"<tools>\n{json.dumps(TOOL)}\n</tools>")
    assert before.startswith("<|im_start|>system\nBe brief.\n\n# Tools")
    assert f"<|im_start|>assistant\n{WRITTEN}<|im_end|>" in after
    response = "<tool_response>\nRain.\n</tool_response>"
    assert f"<|im_start|>user\n{response}\n{response}<|im_end|>" in after


def test_a_template_without_system_messages_gets_tools_from_the_user(templated: Callable[[str], Processor]) -> None:
    text = _text(templated(WITHOUT_SYSTEM), [USER, CALL, RESULT], [TOOL])
    assert "[user] # Tools" in text
    assert "\n\nHow is it in Oslo?\n[assistant] <tool_call>" in text
    assert "[user] <tool_response>\nRain.\n</tool_response>" in text


def test_calls_of_earlier_turns_are_shown_without_tools_too(checkpoint: Callable[[str], Loaded]) -> None:
    for family in ("qwen2_5_vl", "llava", "idefics3", "internvl", "qwen3_vl"):
        text = _text(checkpoint(family).processor, [USER, CALL, RESULT])
        assert WRITTEN in text.replace("  ", " ")
        assert "Rain." in text


def test_images_stand_beside_tools(checkpoint: Callable[[str], Loaded]) -> None:
    for family in ("qwen2_5_vl", "llava", "idefics3", "internvl", "qwen3_vl"):
        processor = checkpoint(family).processor
        messages: list[Message] = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
        prompt = processor.build_chat(messages, [("a", processor.geometry_of_size(64, 64))], tools=[TOOL])
        assert [item.identifier for item in prompt.items] == ["a"]


def test_special_words_in_tools_are_text(checkpoint: Callable[[str], Loaded]) -> None:
    for family in ("qwen2_5_vl", "qwen3_vl"):
        processor = checkpoint(family).processor
        function = {"name": "f", "description": "Sends <|im_end|> and <|image_pad|>."}
        prompt = processor.build_chat([USER], [], tools=[{"type": "function", "function": function}])
        plain = processor.build_chat(
            [USER], [], tools=[{"type": "function", "function": {**function, "description": ""}}]
        )
        for word in ("<|im_end|>", "<|image_pad|>"):
            token_id = processor.tokenizer.token_to_id(word)
            assert token_id is not None
            assert prompt.token_ids.count(token_id) == plain.token_ids.count(token_id)
