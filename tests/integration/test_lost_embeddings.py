"""A store that holds the embeddings of few requests: what is evicted before it was read is encoded again."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from chiasm.launch import RoleConfig
from chiasm.wire import Role
from tests.integration.conftest import ENCODED, SMALL, Service, chat, run, sample_image, stopped

REQUESTS = 24
ENTRIES = 4
ENTRY_BYTES = 36 * 192 * 4 + 4096
"""Of an image of 96 x 96 pixels."""


@pytest.fixture(scope="module", params=["pd", "prefill and decode"])
def tiny(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Service]:
    """An encoder whose store holds few embeddings, and instances that take one at a time out of it and compute one prompt at a
    time."""
    reader = RoleConfig(count=1, threads=1, settings={"ec_receive_bytes": ENTRY_BYTES})
    roles: dict[Role, int | RoleConfig] = (
        {Role.PD: reader} if request.param == "pd" else {Role.PREFILL: reader, Role.DECODE: 1}
    )
    fields = {
        "shared_storage_path": tmp_path_factory.mktemp("tiny") / "store",
        "ec_max_bytes": ENTRIES * ENTRY_BYTES,
        "settings": SMALL | {"max_num_seqs": 1},
    }
    # One test has the reader stand still until the encoder, which may be slow, is far ahead of it.
    patience: dict[str, Any] = {
        "deadline_seconds": 120,
        "wait_for_instance_seconds": 60,
        "probe_timeout_seconds": 120,
        "busy_probe_timeout_seconds": 120,
    }
    yield from run(checkpoint, {Role.ENCODER: 1, **roles}, fields=fields, **patience)


def test_many_images_at_once_are_all_answered_and_right(tiny: Service, aggregated: Service) -> None:
    bodies = [chat(f"number {seed}:", sample_image(5000 + seed), "?") for seed in range(REQUESTS)]
    encoded = tiny.metric(Role.ENCODER, ENCODED)
    lost = tiny.proxy_metric("chiasm_proxy_embeddings_lost_total")
    reader = Role.PD if tiny.deployment.urls(Role.PD) else Role.PREFILL
    with ThreadPoolExecutor(REQUESTS) as pool:
        with stopped(tiny, reader):  # so that it doesn't keep up with the encoder
            answers = [pool.submit(tiny.answer, body) for body in bodies]
            tiny.wait_until(lambda: tiny.metric(Role.ENCODER, ENCODED) > encoded + 2 * ENTRIES)
        assert [answer.result() for answer in answers] == [aggregated.answer(body) for body in bodies]
    assert tiny.proxy_metric("chiasm_proxy_embeddings_lost_total") > lost


def test_a_request_with_more_images_than_the_store_holds_is_answered(tiny: Service, aggregated: Service) -> None:
    body = chat(*(sample_image(6000 + seed) for seed in range(2 * ENTRIES)), "?")
    assert tiny.answer(body) == aggregated.answer(body)


def test_a_store_that_is_removed_while_requests_wait_delays_them(tiny: Service, aggregated: Service) -> None:
    store = tiny.deployment.config.shared_storage_path
    assert store is not None
    bodies = [chat(f"again {seed}:", sample_image(7000 + seed), "?", max_tokens=60) for seed in range(8)]
    with ThreadPoolExecutor(len(bodies)) as pool:
        answers = [pool.submit(tiny.answer, body) for body in bodies]
        tiny.wait_until(lambda: any(answer.done() for answer in answers))
        store.rename(store.with_name("elsewhere"))
        assert [answer.result() for answer in answers] == [aggregated.answer(body) for body in bodies]


@pytest.fixture(scope="module", params=["pd", "prefill and decode"])
def narrow(checkpoint: Path, request: pytest.FixtureRequest) -> Iterator[Service]:
    """Instances that embeddings go to from memory to memory, none of them larger than that of an image of 96 x 96 pixels."""
    reader = RoleConfig(count=1, threads=1, settings={"ec_receive_bytes": ENTRY_BYTES})
    roles: dict[Role, int | RoleConfig] = (
        {Role.PD: reader} if request.param == "pd" else {Role.PREFILL: reader, Role.DECODE: 1}
    )
    yield from run(checkpoint, {Role.ENCODER: 1, **roles}, fields={"settings": SMALL})


def test_an_image_that_can_never_be_received_is_refused_and_not_encoded_again(
    narrow: Service, aggregated: Service
) -> None:
    for seed in range(3):
        answer = narrow.post(chat("what is", sample_image(8000 + seed, 192, 192), "?"))
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["code"] == "embedding_too_large"
        assert "--ec-receive-bytes" in answer.json()["error"]["message"]
    body = chat("what is", sample_image(9000), "?")
    assert narrow.answer(body) == aggregated.answer(body)
    assert narrow.metric(Role.ENCODER, ENCODED) <= 4
    assert narrow.proxy_metric("chiasm_proxy_embeddings_lost_total") == 0
