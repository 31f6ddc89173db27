"""One instance that encodes, publishes and reads, on two tensor-parallel ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import WAIT_SECONDS, Launch
from .processes import Server, transfer_config, vllm
from .wire import chat, embeds_part, encode, image_part, name_of, picture, published

QUESTION = "what shape is it?"


@pytest.fixture(scope="module")
def both(launch: Launch, logs: Path, store: Path) -> Server:
    transfer = transfer_config("ec_both", store, wait_seconds=WAIT_SECONDS)
    server = launch(vllm(logs, "both", transfer, "--tensor-parallel-size", "2"))
    server.wait_ready()
    return server


def test_what_it_encodes_is_published_once(both: Server, pd: Server, aggregated: Server) -> None:
    data = picture(60)
    expected = aggregated.answer(chat(image_part(data), QUESTION))
    assert both.answer(chat(image_part(data, name_of(data)), QUESTION)) == expected
    both.until(lambda: both.count("saves") == 1)
    assert pd.answer(chat(embeds_part(name_of(data), {"image_size": [96, 96]}), QUESTION)) == expected


def test_each_rank_loads_what_others_have_published(both: Server, encoder: Server, aggregated: Server) -> None:
    data = picture(61)
    part, misses = published(encoder, data), both.count("misses")
    assert both.answer(chat(part, QUESTION)) == aggregated.answer(chat(image_part(data), QUESTION))
    assert both.count("misses") == misses


def test_a_picture_that_another_has_published_is_not_encoded(both: Server, encoder: Server, aggregated: Server) -> None:
    data = picture(62)
    encode(encoder, data)
    misses = both.count("misses")
    answer = both.answer(chat(image_part(data, name_of(data)), QUESTION))
    assert answer == aggregated.answer(chat(image_part(data), QUESTION))
    assert both.count("misses") == misses


def test_it_says_what_it_is(both: Server) -> None:
    assert both.health()["role"] == "aggregated"
