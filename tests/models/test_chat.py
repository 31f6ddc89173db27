"""Messages become token ids with one item at the place of each image."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from chiasm.errors import InvalidRequestError
from chiasm.models import load_processor
from chiasm.models.base import Message, Processor
from tests.models.conftest import Loaded, sample_image

IMAGE = {"type": "image"}
STRING_TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content.strip() }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
TEXTS_TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}] {% for part in message.content %}{{ part.text }}{% endfor %}"
    "{% endfor %}"
)


def _text(text: str) -> Message:
    return {"type": "text", "text": text}


def _user(*parts: Message) -> list[Message]:
    return [{"role": "user", "content": list(parts)}]


@pytest.fixture
def qwen(checkpoint: Callable[[str], Loaded]) -> Processor:
    return checkpoint("qwen3_vl").processor


@pytest.fixture
def templated(checkpoint: Callable[[str], Loaded], tmp_path: Path) -> Callable[..., Processor]:
    """A processor with another chat template, or none."""

    def make(template: str | None, family: str = "llava") -> Processor:
        folder = shutil.copytree(checkpoint(family).folder, tmp_path / "templated")
        (folder / "chat_template.jinja").unlink()
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        return load_processor(folder)

    return make


def _decode(processor: Processor, token_ids: list[int]) -> str:
    return processor.tokenizer.decode(token_ids, skip_special_tokens=False)


def test_items_stand_where_the_template_put_their_placeholders(loaded: Loaded) -> None:
    processor = loaded.processor
    sizes = [(40, 64), (64, 33)]
    geometries = [processor.geometry_of_size(*size) for size in sizes]
    prompt = processor.build_chat(
        _user(IMAGE, _text("before"), IMAGE, _text("after")), list(zip("ab", geometries, strict=True))
    )
    assert [item.identifier for item in prompt.items] == ["a", "b"]
    for item, geometry in zip(prompt.items, geometries, strict=True):
        assert tuple(prompt.token_ids[item.offset : item.offset + item.length]) == geometry.token_ids
        assert item.positions == [item.offset + row for row in geometry.rows]
    assert prompt.items[0].offset + prompt.items[0].length <= prompt.items[1].offset


def test_text_alone_has_no_items(qwen: Processor) -> None:
    prompt = qwen.build_chat([{"role": "user", "content": "Hello"}], [])
    assert prompt.items == []
    assert _decode(qwen, prompt.token_ids) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("content", ["Hello there", [_text("Hello there")]], ids=["string", "parts"])
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_content_is_accepted_as_string_and_as_parts(loaded: Loaded, role: str, content: object) -> None:
    messages: list[Message] = [{"role": "user", "content": "first"}, {"role": "user", "content": "last"}]
    messages.insert({"system": 0, "user": 1, "assistant": 1}[role], {"role": role, "content": content})
    text = _decode(loaded.processor, loaded.processor.build_chat(messages, []).token_ids)
    assert all(part in text for part in ("first", "Hello there", "last"))
    assert "type" not in text


def test_a_template_that_expects_strings_gets_strings_with_placeholders(templated: Callable[..., Processor]) -> None:
    processor = templated(STRING_TEMPLATE)
    geometry = processor.geometry_of_size(32, 32)
    messages: list[Message] = [{"role": "system", "content": [_text("Be brief.")]}, *_user(IMAGE, _text("What?"))]
    prompt = processor.build_chat(messages, [("a", geometry)])
    before, after = prompt.token_ids[: prompt.items[0].offset], prompt.token_ids[prompt.items[0].offset + 16 :]
    assert _decode(processor, before) == "<s>[system] Be brief.\n[user] "
    assert _decode(processor, after) == "\nWhat?\n[assistant] "


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"])
@pytest.mark.parametrize("template", [STRING_TEMPLATE, TEXTS_TEMPLATE], ids=["strings", "parts"])
def test_an_image_of_qwen_is_marked_where_the_template_takes_text_alone(
    templated: Callable[..., Processor], family: str, template: str
) -> None:
    processor = templated(template, family)
    prompt = processor.build_chat(_user(IMAGE, _text("What?")), [("a", processor.geometry_of_size(32, 32))])
    text = _decode(processor, prompt.token_ids).replace("<|image_pad|>", "")
    assert text.startswith("[user] <|vision_start|><|vision_end|>")


def test_each_role_gets_the_form_that_the_template_expects_for_it(templated: Callable[..., Processor]) -> None:
    processor = templated(
        "{% for message in messages %}{{ message.role }}: {% if message.role == 'user' %}{% for part in message.content %}"
        "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}"
        "{% else %}{{ message.content.strip() }}{% endif %}{{ '\n' }}{% endfor %}"
    )
    geometry = processor.geometry_of_size(32, 32)
    messages: list[Message] = [
        {"role": "system", "content": [_text("Be"), IMAGE, _text("brief.")]},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": [_text("Hi")]},
    ]
    prompt = processor.build_chat(messages, [("a", geometry)])
    text = _decode(processor, prompt.token_ids).replace("<image>", "")
    assert text == "<s>system: Be\n\nbrief.\nuser: Hello\nassistant: Hi\n"


def test_without_a_template_there_is_no_chat(templated: Callable[..., Processor]) -> None:
    processor = templated(None)
    with pytest.raises(InvalidRequestError, match="no chat template"):
        processor.build_chat([{"role": "user", "content": "Hello"}], [])
    assert processor.build_text("Hello").token_ids


def test_a_plain_prompt_has_the_special_tokens_of_the_tokenizer_unless_told_otherwise(
    checkpoint: Callable[[str], Loaded],
) -> None:
    processor = checkpoint("llava").processor
    assert _decode(processor, processor.build_text("Hello").token_ids) == "<s>Hello"
    assert _decode(processor, processor.build_text("<s>Hello", add_special_tokens=False).token_ids) == "<s>Hello"


@pytest.mark.parametrize("file", ["chat_template.json", "processor_config.json", "tokenizer_config.json"])
def test_templates_are_found_where_older_checkpoints_keep_them(
    checkpoint: Callable[[str], Loaded], tmp_path: Path, file: str
) -> None:
    folder = shutil.copytree(checkpoint("llava").folder, tmp_path / "older")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    content = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps(content | {"chat_template": template}))
    prompt = load_processor(folder).build_chat([{"role": "user", "content": "Hello"}], [])
    assert prompt == checkpoint("llava").processor.build_chat([{"role": "user", "content": "Hello"}], [])


@pytest.mark.parametrize(("family", "begin"), [("llava", "<s>"), ("smolvlm", "<|im_start|>")])
def test_the_beginning_of_text_is_written_once_by_tokenizer_or_template(
    checkpoint: Callable[[str], Loaded], family: str, begin: str
) -> None:
    processor = checkpoint(family).processor
    text = _decode(processor, processor.build_chat([{"role": "user", "content": "Hello"}], []).token_ids)
    assert text.startswith(begin)
    assert text.count(begin) == 1


def test_token_ids_must_be_known_and_no_placeholder(loaded: Loaded) -> None:
    geometry = loaded.processor.geometry_of_size(32, 32)
    with pytest.raises(InvalidRequestError, match="chat/completions"):
        loaded.processor.build_tokens([1, geometry.token_ids[geometry.rows[0]]])
    with pytest.raises(InvalidRequestError, match="between 0 and"):
        loaded.processor.build_tokens([1, loaded.processor.vocab_size])
    assert loaded.processor.build_tokens([1, 2]).token_ids == [1, 2]


@pytest.mark.parametrize("count", [0, 2])
def test_there_must_be_one_item_for_each_place(qwen: Processor, count: int) -> None:
    items = [("a", qwen.geometry_of_size(32, 32))] * count
    with pytest.raises(InvalidRequestError, match=f"1 places for images, but there are {count} images"):
        qwen.build_chat(_user(IMAGE), items)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        ["text"],
        [{"role": ["user"], "content": [{"type": "video"}]}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "audio"}]}],
        [{"role": "user", "content": [{"type": "text", "text": 5}]}],
        [{"role": "user", "content": ["text"]}],
    ],
    ids=str,
)
def test_malformed_messages_are_refused(loaded: Loaded, messages: list[Any]) -> None:
    with pytest.raises(InvalidRequestError):
        loaded.processor.build_chat(messages, [])


def test_values_that_are_nested_too_deeply_are_refused(qwen: Processor) -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(InvalidRequestError, match="nested too deeply"):
        qwen.build_chat([{"role": "user", "content": "x"}], [], template_kwargs={"tools": deep})


def test_an_error_of_the_template_is_an_invalid_request(templated: Callable[..., Processor]) -> None:
    processor = templated("{{ raise_exception('roles must alternate') if messages | length > 1 }}x")
    with pytest.raises(InvalidRequestError, match="roles must alternate"):
        processor.build_chat([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], [])


def test_template_kwargs_reach_the_template_but_must_not_set_reserved_arguments(
    templated: Callable[..., Processor],
) -> None:
    processor = templated("{{ tone }} {{ tools }} {% for m in messages %}{{ m.content }}{% endfor %}")
    user: list[Message] = [{"role": "user", "content": "hi"}]
    prompt = processor.build_chat(user, [], template_kwargs={"tone": "kind", "tools": [{"name": "f"}]})
    assert "kind" in _decode(processor, prompt.token_ids)
    assert "'name'" in _decode(processor, prompt.token_ids)
    for reserved in ("chat_template", "tokenize", "add_generation_prompt"):
        with pytest.raises(InvalidRequestError, match=reserved):
            processor.build_chat(user, [], template_kwargs={reserved: "x"})
    with pytest.raises(InvalidRequestError):
        processor.build_chat(user, [], template_kwargs={"messages": []})


def test_a_final_message_can_be_continued(qwen: Processor) -> None:
    messages = [{"role": "user", "content": "Count"}, {"role": "assistant", "content": "One, two,"}]
    prompt = qwen.build_chat(messages, [], continue_final_message=True)
    assert _decode(qwen, prompt.token_ids).endswith("assistant\nOne, two,")


def test_a_processor_can_be_shared_between_threads(loaded: Loaded) -> None:
    def build(index: int) -> tuple[list[int], torch.Tensor]:
        pixels = loaded.processor.preprocess(sample_image(index % 4))
        return loaded.prompt([pixels], text=f"number {index % 4}").token_ids, pixels.inputs["pixel_values"]

    expected = [build(index) for index in range(4)]
    with ThreadPoolExecutor(8) as pool:
        for index, (token_ids, pixel_values) in enumerate(pool.map(build, range(48))):
            assert token_ids == expected[index % 4][0]
            assert torch.equal(pixel_values, expected[index % 4][1])


def test_every_eos_token_that_the_checkpoint_names_ends_an_answer(edited: Callable[..., Path]) -> None:
    folder = edited(file="generation_config.json", eos_token_id=[3, 4])
    edited(eos_token_id=5)
    text_config = json.loads((folder / "config.json").read_text())["text_config"]
    edited(text_config=text_config | {"eos_token_id": 6})
    tokenizer_eos = load_processor(folder).tokenizer.token_to_id("<|im_end|>")
    assert load_processor(folder).eos_token_ids == {3, 4, 5, 6, tokenizer_eos}


@pytest.mark.parametrize(
    ("values", "sampling"),
    [
        ({}, {}),
        ({"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.05}, None),
        ({"temperature": None, "top_k": "20", "top_p": True}, {}),
        ({"do_sample": False, "repetition_penalty": 1.1}, {"temperature": 0.0, "repetition_penalty": 1.1}),
    ],
)
def test_sampling_defaults_are_those_of_the_checkpoint(
    edited: Callable[..., Path], values: dict[str, Any], sampling: dict[str, float] | None
) -> None:
    folder = edited(file="generation_config.json", **values)
    assert load_processor(folder).default_sampling == (values if sampling is None else sampling)


def test_vocabulary_and_context_are_those_of_the_language_model(loaded: Loaded) -> None:
    assert loaded.processor.vocab_size == loaded.language.vocab_size
    assert loaded.processor.max_model_len == 4096


def test_placeholders_equal_those_of_the_families_own_processors(checkpoint: Callable[[str], Loaded]) -> None:
    """Compared with the processors of transformers, without the video processors that most of them need."""
    from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
    from transformers.models.internvl.processing_internvl import InternVLProcessor
    from transformers.models.llava.processing_llava import LlavaProcessor
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
    from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

    image = sample_image(1, 50, 90)

    def tokens(family: str) -> str:
        loaded = checkpoint(family)
        return _decode(loaded.processor, list(loaded.processor.preprocess(image).geometry.token_ids))

    qwen = SimpleNamespace(image_token="<|image_pad|>", image_processor=SimpleNamespace(merge_size=2))
    grid = checkpoint("qwen3_vl").processor.preprocess(image).inputs["image_grid_thw"]
    assert tokens("qwen3_vl") == Qwen3VLProcessor.replace_image_token(qwen, {"image_grid_thw": grid}, 0)

    internvl = SimpleNamespace(
        start_image_token="<img>", end_image_token="</img>", image_token="<IMG_CONTEXT>", image_seq_length=4
    )
    assert tokens("internvl") == InternVLProcessor.replace_image_token(internvl, {"num_patches": [3]}, 0)

    smolvlm = get_image_prompt_string(2, 2, 4, "<fake_token_around_image>", "<image>", "<global-img>")
    assert tokens("smolvlm") == smolvlm

    for family, processor_class in (("idefics3", Idefics3Processor), ("llava", LlavaProcessor)):
        loaded = checkpoint(family)
        expected = processor_class.from_pretrained(loaded.folder).apply_chat_template(
            [{"role": "user", "content": [{"type": "image", "image": image}, _text("What is this?")]}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        pixels = loaded.processor.preprocess(image)
        assert loaded.prompt([pixels]).token_ids == expected["input_ids"][0].tolist(), family
        assert torch.equal(pixels.inputs["pixel_values"], expected["pixel_values"]), family
