"""The two parts together compute what transformers computes with the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from chiasm.bench import synthetic
from chiasm.models.base import Pixels, Prompt
from tests.models.conftest import Loaded, sample_image
from tests.models.driver import Driver

MAX_TOKENS = 10

IMAGES = {
    "text only": [],
    "one image": [(1, 40, 64)],
    "two images": [(1, 40, 64), (2, 64, 33)],
    "one image twice": [(1, 40, 64), (1, 40, 64)],
}


def _request(loaded: Loaded, images: list[tuple[int, int, int]]) -> tuple[Prompt, list[Pixels], list[torch.Tensor]]:
    pixels = [loaded.processor.preprocess(sample_image(*arguments)) for arguments in images]
    return loaded.prompt(pixels), pixels, [loaded.vision.encode(item) for item in pixels]


@pytest.mark.parametrize("images", IMAGES.values(), ids=IMAGES)
def test_greedy_tokens_equal_the_whole_models_for_every_chunk_size(
    loaded: Loaded, images: list[tuple[int, int, int]]
) -> None:
    prompt, pixels, entries = _request(loaded, images)
    expected = loaded.reference(prompt, pixels, MAX_TOKENS)
    driver = Driver(loaded.language)
    for chunk in (5, 16, len(prompt.token_ids)):
        assert driver.generate(prompt, entries, chunk=chunk, max_tokens=MAX_TOKENS) == expected, f"chunk {chunk}"


@pytest.mark.parametrize(
    ("family", "text_config"),
    [
        ("llava", {"model_type": "mistral", "sliding_window": 12}),
        ("internvl", {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1}),
        ("internvl", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}}),
        ("qwen3_vl", {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}),
        ("internvl", {"model_type": "qwen3"}),
        (
            "internvl",
            {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
        ),
    ],
    ids=[
        "mistral, windows",
        "qwen2, windows in some layers",
        "qwen2, dynamic rope",
        "qwen3_vl, axes by default",
        "qwen3",
        "qwen3_moe",
    ],
)
def test_other_decoders_give_the_same_tokens_as_the_whole_model(
    tmp_path: Path, family: str, text_config: dict[str, object]
) -> None:
    loaded = Loaded(family, synthetic.make(family, tmp_path, text_config=text_config))
    prompt, pixels, entries = _request(loaded, IMAGES["two images"])
    expected = loaded.reference(prompt, pixels, MAX_TOKENS)
    driver = Driver(loaded.language)
    for chunk in (5, len(prompt.token_ids)):
        assert driver.generate(prompt, entries, chunk=chunk, max_tokens=MAX_TOKENS) == expected, f"chunk {chunk}"


def test_requests_that_decode_and_prefill_in_the_same_step_do_not_mix(loaded: Loaded) -> None:
    driver = Driver(loaded.language)
    requests, expected = [], []
    for images in IMAGES.values():
        prompt, pixels, entries = _request(loaded, images)
        requests.append(driver.add(prompt, entries))
        expected.append(loaded.reference(prompt, pixels, MAX_TOKENS))
    running = requests[:1]
    mixed_steps = 0
    while any(len(request.generated) < MAX_TOKENS for request in requests):
        mixed_steps += len({request.is_decoding for request in running}) == 2
        driver.step(running, chunk=7)
        running = requests[: len(running) + 1]
    assert mixed_steps > 3
    assert [request.generated[:MAX_TOKENS] for request in requests] == expected


def test_answers_depend_on_the_images_and_their_order(loaded: Loaded) -> None:
    first, second = (1, 40, 64), (2, 40, 64)
    driver = Driver(loaded.language)
    answers = []
    for images in ([], [first], [second], [first, second], [second, first]):
        prompt, _, entries = _request(loaded, images)
        answers.append(tuple(driver.generate(prompt, entries, chunk=64, max_tokens=MAX_TOKENS)))
    assert len(set(answers)) == len(answers)


def test_bfloat16_entries_equal_those_of_the_whole_model_in_bfloat16(loaded: Loaded) -> None:
    from transformers import AutoModelForImageTextToText

    from chiasm.models import load_language, load_vision

    kind: dict[str, Any] = {"dtype": torch.bfloat16, "device": torch.device("cpu")}
    vision, language = load_vision(loaded.folder, **kind), load_language(loaded.folder, **kind)
    pixels = loaded.processor.preprocess(sample_image(1))
    entry = vision.encode(pixels)
    assert entry.dtype == torch.bfloat16
    whole = AutoModelForImageTextToText.from_pretrained(loaded.folder, dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        features = whole.get_image_features(**pixels.inputs, return_dict=True).pooler_output
    features = torch.cat([part.reshape(-1, part.shape[-1]) for part in features])
    assert torch.equal(entry[:, : language.hidden_size], features)
    frequencies = {buffer.dtype for name, buffer in language.module.named_buffers() if "inv_freq" in name}
    assert frequencies == {torch.float32}
