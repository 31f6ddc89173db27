"""An instance that encodes, publishes and reads, on two tensor-parallel ranks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from chiasm.errors import ConfigurationError

from .conftest import WAIT_SECONDS, Launch
from .processes import Server, transfer_config, vllm
from .wire import chat, embeds_part, encode, image_bytes, image_part, name_of, published

QUESTION = "what shape is it?"


@pytest.fixture(scope="module")
def both(launch: Launch, logs: Path, store: Path) -> Server:
    transfer = transfer_config("ec_both", store, wait_seconds=WAIT_SECONDS)
    environment = {"PYTHONHASHSEED": "1"}
    server = launch(vllm(logs, "both", transfer, "--tensor-parallel-size", "2", environment=environment))
    server.wait_ready()
    return server


def test_what_it_encodes_is_published_once(both: Server, pd: Server, aggregated: Server) -> None:
    data = image_bytes(60)
    expected = aggregated.answer(chat(image_part(data), QUESTION))
    assert both.answer(chat(image_part(data, name_of(data)), QUESTION)) == expected
    both.until(lambda: both.count("saves") == 1)
    assert pd.answer(chat(embeds_part(name_of(data), {"image_size": [96, 96]}), QUESTION)) == expected


def test_each_rank_loads_what_others_have_published(both: Server, encoder: Server, aggregated: Server) -> None:
    data = image_bytes(61)
    part, misses = published(encoder, data), both.count("misses")
    assert both.answer(chat(part, QUESTION)) == aggregated.answer(chat(image_part(data), QUESTION))
    assert both.count("misses") == misses


def test_an_image_that_another_instance_has_published_is_not_encoded(
    both: Server, encoder: Server, aggregated: Server
) -> None:
    data = image_bytes(62)
    encode(encoder, data)
    misses = both.count("misses")
    answer = both.answer(chat(image_part(data, name_of(data)), QUESTION))
    assert answer == aggregated.answer(chat(image_part(data), QUESTION))
    assert both.count("misses") == misses


def test_its_role_is_aggregated(both: Server) -> None:
    assert both.health().role == "aggregated"


def test_ranks_that_might_differ_in_the_order_of_modalities_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of all starts would otherwise end with "connection reset"."""
    from chiasm.integrations.vllm.ec_connector import _check

    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    config = SimpleNamespace(
        model_config=SimpleNamespace(),
        parallel_config=SimpleNamespace(tensor_parallel_size=2),
        ec_transfer_config=SimpleNamespace(is_ec_producer=True),
    )
    with pytest.raises(ConfigurationError, match="set PYTHONHASHSEED in its environment to a number"):
        _check(config)


def test_pipeline_parallel_ranks_that_would_load_embeddings_are_refused() -> None:
    """The answer to an image that can't be loaded would be about zeros."""
    from chiasm.integrations.vllm.ec_connector import _check

    config = SimpleNamespace(
        model_config=SimpleNamespace(),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=2),
        ec_transfer_config=SimpleNamespace(is_ec_producer=False, is_ec_consumer=True),
    )
    with pytest.raises(ConfigurationError, match="cannot load embeddings with --pipeline-parallel-size"):
        _check(config)
