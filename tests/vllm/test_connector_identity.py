"""Encoder and PD apart, without a proxy: what they answer is what one instance alone answers."""

from __future__ import annotations

from .processes import Server
from .wire import chat, image_part, picture, published

QUESTION = "what shape is it?"


def test_one_picture(encoder: Server, pd: Server, aggregated: Server) -> None:
    data = picture(1)
    expected = aggregated.answer(chat(image_part(data), QUESTION))
    assert pd.answer(chat(published(encoder, data), QUESTION)) == expected
