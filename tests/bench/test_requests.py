"""What is sent: the same for the same seed, and of the requested size."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from chiasm.bench import requests
from chiasm.bench.requests import draw_requests, sampling


def test_the_name_of_a_photo_determines_its_file() -> None:
    assert requests.photo("a", 64) == requests.photo("a", 64)
    assert requests.photo("a", 64) != requests.photo("b", 64)
    assert Image.open(io.BytesIO(requests.photo("a", 512))).size == (512, 512)


def test_noise_has_the_requested_size() -> None:
    data = requests.noise("a", 1_000_000)
    assert len(data) == pytest.approx(1_000_000, rel=0.01)
    assert data == requests.noise("a", 1_000_000)
    assert Image.open(io.BytesIO(data)).format == "PNG"


def test_a_data_url_names_the_kind_of_file() -> None:
    assert requests.data_url(requests.photo("a", 16)).startswith("data:image/jpeg;base64,")
    assert requests.data_url(requests.noise("a", 300)).startswith("data:image/png;base64,")


def test_requests_of_one_seed_are_the_same_bytes_twice() -> None:
    first, again = draw_requests(7, 24), draw_requests(7, 24)
    assert first == again
    assert first != draw_requests(8, 24)


def test_two_hundred_requests_are_of_all_kinds() -> None:
    counted = Counter(request.kind for request in draw_requests(0, 200))
    assert sum(counted.values()) == 200
    assert set(counted) == {"text", "1 image", "2 images", "3 images", "4 images", "the same image twice"}
    assert min(counted.values()) >= 20


def test_a_kind_determines_the_number_of_images() -> None:
    for request in draw_requests(1, 24):
        if request.kind == "the same image twice":
            assert request.images[0] == request.images[1]
        elif request.kind != "text":
            assert len(set(request.images)) == len(request.images) == int(request.kind[0])
        else:
            assert not request.images


def test_few_requests_are_of_different_kinds() -> None:
    assert len({request.kind for request in draw_requests(0, 6)}) == 6


def test_requests_are_sampled_with_different_seeds_and_some_with_penalties() -> None:
    drawn = [sampling(3, index) for index in range(12)]
    assert drawn == [sampling(3, index) for index in range(12)]
    assert len({fields["seed"] for fields in drawn}) == 12
    assert all(fields["temperature"] > 0 for fields in drawn)
    with_penalties = [fields for fields in drawn if {"presence_penalty", "repetition_penalty"} & set(fields)]
    assert len(with_penalties) == 8
    assert {fields["ignore_eos"] for fields in with_penalties} == {True, False}
    body = json.loads(requests.ask([], "hello", max_tokens=5, **drawn[0]))
    assert body["temperature"] == 0.8


def test_a_body_asks_for_a_greedy_answer() -> None:
    body = json.loads(requests.ask([requests.photo("a", 16)], "what is it?", max_tokens=5, stream=True))
    assert body["temperature"] == 0
    assert body["max_tokens"] == 5
    assert body["stream"] is True
    assert [part["type"] for part in body["messages"][0]["content"]] == ["image_url", "text"]
    assert json.loads(requests.ask([], "hello", max_tokens=5))["messages"][0]["content"] == "hello"


def test_a_text_has_exactly_the_requested_number_of_tokens(checkpoint: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    texts = requests.Texts(checkpoint, 0)
    drawn = [texts.of(tokens) for tokens in (1, 2, 17, 300)]
    assert [len(tokenizer.encode(text).ids) for text in drawn] == [1, 2, 17, 300]
    again = requests.Texts(checkpoint, 0)
    assert drawn == [again.of(tokens) for tokens in (1, 2, 17, 300)]
    assert texts.of(300) != drawn[-1]
