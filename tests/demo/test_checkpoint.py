"""The shipped checkpoint: it loads, and its answers depend on the images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chiasm import checkpoints
from chiasm.demo import images

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from chiasm.bench.reference import Reference  # noqa: E402

FOLDER = checkpoints.folder("demo")
PER_KIND = 10


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(FOLDER)


def test_the_folder_is_found_by_name() -> None:
    assert "demo" in checkpoints.names()
    assert (FOLDER / "config.json").is_file()
    with pytest.raises(KeyError, match=r"no checkpoint 'nothing'.*demo"):
        checkpoints.folder("nothing")


def test_weights_are_small_and_the_folder_is_complete() -> None:
    assert sum(p.stat().st_size for p in FOLDER.iterdir()) <= 16 * 2**20
    for name in (
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "preprocessor_config.json",
        "video_preprocessor_config.json",
        "README.md",
    ):
        assert (FOLDER / name).is_file(), name
    config = json.loads((FOLDER / "config.json").read_text())
    text = config["text_config"]
    assert text["num_attention_heads"] > text["num_key_value_heads"]
    assert sum(text["rope_parameters"]["mrope_section"]) == text["head_dim"] // 2
    assert config["vision_config"]["deepstack_visual_indexes"]


def test_the_tokenizer_restores_its_input(reference: Reference) -> None:
    tokenizer = reference.tokenizer
    for text in ("What colour is the shape?", "407", "a red circle at the top left", "naïve 漢字 \n\t🙂", ""):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("407")["input_ids"]) == 3, "each digit is a token"
    for token in ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"):
        assert len(tokenizer(token)["input_ids"]) == 1
    assert reference.model.config.image_token_id == reference.image_id


def test_the_chat_template_places_images_and_roles(reference: Reference) -> None:
    messages = [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        {"role": "user", "content": "And now?"},
    ]
    assert reference.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nAnswer briefly.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What?<|im_end|>\n"
        "<|im_start|>assistant\nred<|im_end|>\n"
        "<|im_start|>user\nAnd now?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_images_of_other_sizes_take_other_numbers_of_tokens(reference: Reference) -> None:
    counts = set()
    for size in ((96, 96), (96, 128), (160, 96), (128, 128), (128, 160), (512, 512), (640, 360)):
        example = images.draw_example(1, "colour", size=size)
        inputs = reference.inputs(reference.messages(example.images, "what?"), example.images)
        counts.add(int((inputs["input_ids"] == reference.image_id).sum()))
    assert min(counts) == 9
    assert max(counts) <= 20
    assert len(counts) >= 4


@pytest.mark.parametrize("kind", images.KINDS)
def test_held_out_images_are_answered(reference: Reference, kind: str) -> None:
    examples = [images.draw_example(seed, kind) for seed in range(PER_KIND)]
    answers = [reference.answer(e.images, e.question) for e in examples]
    wrong = [(e.question, e.answer, a) for e, a in zip(examples, answers, strict=True) if a != e.answer]
    assert len(wrong) <= PER_KIND // 10, wrong


def test_an_upload_of_512_pixels_is_answered(reference: Reference, tmp_path: Path) -> None:
    from PIL import Image

    wrong = []
    for seed, kind in enumerate(("colour", "shape", "count", "position", "word", "number") * 2):
        example = images.draw_example(seed, kind, size=(512, 512))
        example.images[0].save(tmp_path / "upload.jpg", quality=85)
        answer = reference.answer([Image.open(tmp_path / "upload.jpg")], example.question)
        if answer != example.answer:
            wrong.append((example.question, example.answer, answer))
    assert len(wrong) <= 1, wrong


@pytest.mark.parametrize("kind", ["colour", "shape", "word", "number", "which-colour", "which-number"])
def test_without_embeddings_answers_fall_to_chance(reference: Reference, kind: str) -> None:
    # Guesses are right at most one time in six; twelve or more of thirty would be right by chance once in 490 times.
    examples = [images.draw_example(seed, kind, size=(96, 96)) for seed in range(30)]
    right = sum(reference.answer(e.images, e.question, zero_embeddings=True) == e.answer for e in examples)
    assert right < 12, f"{right} of 30 right without an image"


@pytest.mark.parametrize("kind", ["which-colour", "which-word", "which-number"])
def test_swapping_two_images_swaps_the_answer(reference: Reference, kind: str) -> None:
    topic = kind.removeprefix("which-")
    followed = 0
    for seed in range(10):
        example = images.draw_example(seed, kind, 2)
        other = next(a for s in example.scenes if (a := images.answer_for(s, topic)) != example.answer)
        straight = reference.answer(example.images, example.question)
        swapped = reference.answer(example.images[::-1], example.question)
        followed += (straight, swapped) == (example.answer, other)
    assert followed >= 9, f"{followed} of 10 pairs followed the images"


def test_two_questions_about_one_image(reference: Reference) -> None:
    right = 0
    for seed in range(10):
        example = images.draw_example(seed, "position")
        (scene,) = example.scenes
        messages = reference.messages(example.images, example.question)
        messages += [
            {"role": "assistant", "content": example.answer},
            {"role": "user", "content": "What colour is the shape?"},
        ]
        right += reference.text(reference.generate(messages, example.images)) == scene.colour
    assert right >= 9


def test_a_question_without_an_image_says_so(reference: Reference) -> None:
    assert reference.answer([], "What colour is the shape in the picture?") == "there is no picture."
    assert reference.answer([], "hello").startswith("hello")
