"""Encoder and PD apart, without a proxy: what they answer is what one instance alone answers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from .processes import Server
from .wire import chat, embeds_part, encode, image_part, name_of, picture, published

QUESTION = "what shape is it?"


def test_one_picture(encoder: Server, pd: Server, aggregated: Server) -> None:
    data = picture(1)
    expected = aggregated.answer(chat(image_part(data), QUESTION))
    assert pd.answer(chat(published(encoder, data), QUESTION)) == expected


def test_by_height_and_width_alone(encoder: Server, pd: Server, aggregated: Server) -> None:
    data = picture(2, (130, 70))
    encode(encoder, data)
    expected = aggregated.answer(chat(image_part(data), QUESTION))
    assert pd.answer(chat(embeds_part(name_of(data), {"image_size": [70, 130]}), QUESTION)) == expected


@pytest.mark.parametrize("seeds", [(3, 4), (5, 5), (6, 7, 6)])
def test_several_pictures(encoder: Server, pd: Server, aggregated: Server, seeds: tuple[int, ...]) -> None:
    pictures = [picture(seed) for seed in seeds]
    expected = aggregated.answer(chat(*map(image_part, pictures), "what is in the second picture?"))
    parts = [published(encoder, data) for data in pictures]
    assert pd.answer(chat(*parts, "what is in the second picture?")) == expected


def test_two_requests_at_once_and_two_rounds(encoder: Server, pd: Server, aggregated: Server) -> None:
    pictures = [picture(8), picture(9)]
    expected = [aggregated.answer(chat(image_part(data), QUESTION)) for data in pictures]
    bodies = [chat(published(encoder, data), QUESTION) for data in pictures]
    with ThreadPoolExecutor() as pool:
        for _ in range(2):
            assert list(pool.map(pd.answer, bodies)) == expected


def test_a_text_needs_no_embedding(pd: Server, aggregated: Server) -> None:
    assert pd.answer(chat("who are you?")) == aggregated.answer(chat("who are you?"))
