"""Entries that are harmed in the middle of a step: the request gets a response or an error, and the engine goes on."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from .conftest import OTHER_WAIT_SECONDS
from .processes import ASKED, HARMS, POINTS, Server
from .wire import Body, chat, embeds_part, image_bytes, image_part, name_of, published

QUESTION = "what shape is it?"


def order(faults: Path, data: bytes, point: str, harm: str) -> Path:
    fault = faults / f"{name_of(data)}.{point}.{harm}"
    fault.touch()
    return fault


def ask(encoder: Server, data: bytes) -> Body:
    return chat(published(encoder, data), QUESTION)


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("point", POINTS)
def test_the_engine_goes_on_and_the_response_is_right(
    encoder: Server, other_pd: Server, aggregated: Server, faults: Path, point: str, harm: str
) -> None:
    data = image_bytes(1000 + POINTS.index(point) * len(HARMS) + HARMS.index(harm))
    expected = aggregated.answer(chat(image_part(data), QUESTION))
    body = ask(encoder, data)
    fault = order(faults, data, point, harm)
    response = other_pd.post(body)
    assert not fault.exists()
    assert response.json()["choices"][0]["message"]["content"] == expected
    assert other_pd.answer(ask(encoder, data)) == expected


@pytest.mark.parametrize("harm", HARMS)
def test_what_a_worker_cannot_load_fails_its_requests_and_the_next_response_is_right(
    encoder: Server, other_pd: Server, aggregated: Server, faults: Path, harm: str
) -> None:
    data, other = image_bytes(1100 + HARMS.index(harm)), image_bytes(1200)
    expected = aggregated.answer(chat(image_part(data), QUESTION))
    body, good = ask(encoder, data), ask(encoder, other)
    order(faults, data, "out-of-reach", harm)
    with ThreadPoolExecutor(4) as pool:
        responses = list(pool.map(other_pd.post, [body, good, body, body]))
    assert responses.pop(1).status_code == 200
    # Who comes to a later step can be answered: the scheduler has the embedding in its memory.
    answered = [response for response in responses if response.status_code == 200]
    assert {response.status_code for response in responses} - {200} == {503}
    assert all(response.json()["choices"][0]["message"]["content"] == expected for response in answered)
    # Blocks that were computed from zeros are not reused for the same prompt.
    assert other_pd.answer(ask(encoder, data)) == expected
    assert other_pd.answer(ask(encoder, data)) == expected


def test_the_engine_rests_while_all_requests_wait(other_pd: Server, faults: Path) -> None:
    (faults / ASKED).touch()
    before = (faults / ASKED).stat().st_size
    assert other_pd.post(chat(embeds_part("ab" * 32, {"image_size": [96, 96]}), QUESTION)).status_code == 503
    # Without chiasm's hooks vLLM asks every millisecond or two; with them, ten times a second.
    assert (faults / ASKED).stat().st_size - before < 40 * OTHER_WAIT_SECONDS
