"""An encoder and a PD without a proxy: their response is the same as that of one instance alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from .processes import Server
from .wire import chat, embeds_part, encode, image_bytes, image_part, name_of, published

QUESTION = "what shape is it?"


def test_one_image(encoder: Server, pd: Server, aggregated: Server) -> None:
    data = image_bytes(1)
    expected = aggregated.answer(chat(image_part(data), QUESTION))
    assert pd.answer(chat(published(encoder, data), QUESTION)) == expected


def test_by_height_and_width_alone(encoder: Server, pd: Server, aggregated: Server) -> None:
    data = image_bytes(2, (130, 70))
    encode(encoder, data)
    expected = aggregated.answer(chat(image_part(data), QUESTION))
    assert pd.answer(chat(embeds_part(name_of(data), {"image_size": [70, 130]}), QUESTION)) == expected


@pytest.mark.parametrize("seeds", [(3, 4), (5, 5), (6, 7, 6)])
def test_several_images(encoder: Server, pd: Server, aggregated: Server, seeds: tuple[int, ...]) -> None:
    images = [image_bytes(seed) for seed in seeds]
    expected = aggregated.answer(chat(*map(image_part, images), "what is in the second picture?"))
    parts = [published(encoder, data) for data in images]
    assert pd.answer(chat(*parts, "what is in the second picture?")) == expected


def test_two_requests_at_once_and_two_rounds(encoder: Server, pd: Server, aggregated: Server) -> None:
    images = [image_bytes(8), image_bytes(9)]
    expected = [aggregated.answer(chat(image_part(data), QUESTION)) for data in images]
    bodies = [chat(published(encoder, data), QUESTION) for data in images]
    with ThreadPoolExecutor() as pool:
        for _ in range(2):
            assert list(pool.map(pd.answer, bodies)) == expected


def test_a_text_needs_no_embedding(pd: Server, aggregated: Server) -> None:
    assert pd.answer(chat("who are you?")) == aggregated.answer(chat("who are you?"))
