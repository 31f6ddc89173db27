"""Entries that are harmed in the middle of a step: the request gets its answer or an error, and the engine lives."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from .conftest import Launch
from .faulty_connector import ASKED, FAULTS, HARMS, POINTS
from .processes import ROOT, Server, transfer_config, vllm
from .wire import Body, chat, embeds_part, image_bytes, image_part, name_of, published

QUESTION = "what shape is it?"


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def faulty_pd(launch: Launch, logs: Path, store: Path, faults: Path) -> Server:
    """A PD that waits half a second, and whose connector harms entries."""
    transfer = transfer_config("ec_consumer", store, wait_seconds=0.5)
    transfer |= {"ec_connector": "FaultyECConnector", "ec_connector_module_path": "tests.vllm.faulty_connector"}
    server = launch(vllm(logs, "faulty-pd", transfer, environment={FAULTS: str(faults), "PYTHONPATH": str(ROOT)}))
    server.wait_ready()
    return server


def order(faults: Path, data: bytes, point: str, harm: str) -> Path:
    fault = faults / f"{name_of(data)}.{point}.{harm}"
    fault.touch()
    return fault


def ask(encoder: Server, data: bytes) -> Body:
    return chat(published(encoder, data), QUESTION)


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("point", POINTS)
def test_the_engine_lives_and_answers_rightly(
    encoder: Server, faulty_pd: Server, aggregated: Server, faults: Path, point: str, harm: str
) -> None:
    data = image_bytes(1000 + POINTS.index(point) * len(HARMS) + HARMS.index(harm))
    expected = aggregated.answer(chat(image_part(data), QUESTION))
    body = ask(encoder, data)
    fault = order(faults, data, point, harm)
    response = faulty_pd.post(body)
    assert not fault.exists()
    if point == "seen":  # Nothing was promised yet: it is waited for.
        assert response.status_code == 503
    else:
        assert response.json()["choices"][0]["message"]["content"] == expected
    assert faulty_pd.answer(ask(encoder, data)) == expected


@pytest.mark.parametrize("harm", HARMS)
def test_what_a_worker_cannot_get_fails_its_requests_and_is_right_the_next_time(
    encoder: Server, faulty_pd: Server, aggregated: Server, faults: Path, harm: str
) -> None:
    data, other = image_bytes(1100 + HARMS.index(harm)), image_bytes(1200)
    expected = aggregated.answer(chat(image_part(data), QUESTION))
    body, good = ask(encoder, data), ask(encoder, other)
    order(faults, data, "out-of-reach", harm)
    with ThreadPoolExecutor(4) as pool:
        responses = list(pool.map(faulty_pd.post, [body, good, body, body]))
    assert [response.status_code for response in responses] == [503, 200, 503, 503]
    # The same prompt again: what was computed in place of the lost embedding is not taken for it.
    assert faulty_pd.answer(ask(encoder, data)) == expected
    assert faulty_pd.answer(ask(encoder, data)) == expected


def test_while_all_requests_wait_the_engine_rests(faulty_pd: Server, faults: Path) -> None:
    before = (faults / ASKED).stat().st_size
    assert faulty_pd.post(chat(embeds_part("ab" * 32, {"image_size": [96, 96]}), QUESTION)).status_code == 503
    # vLLM by itself asks every millisecond or two.
    assert (faults / ASKED).stat().st_size - before < 20
