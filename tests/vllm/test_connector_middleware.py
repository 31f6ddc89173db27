"""vLLM's HTTP server with chiasm's middleware."""

from __future__ import annotations

from pathlib import Path

import pytest

from chiasm.http.timing import read_timing
from chiasm.integrations.vllm.outputs import PREFILL_WORK
from chiasm.models.identity import fingerprint

from .processes import CALL_SECONDS, CHECKPOINT, CLIENT, MODEL, Server
from .wire import chat, embeds_part

CLOCKS_SECONDS = 1.0
"""How far apart two clocks of one engine may be that are read one after the other, on a busy machine."""


def test_health_of_an_encoder_and_a_pd(encoder: Server, pd: Server, store: Path) -> None:
    for server, role in ((encoder, "encoder"), (pd, "pd")):
        health = server.health()
        assert health.status == "ok"
        assert (health.role, health.model, health.max_model_len) == (role, MODEL, 2048)
        assert health.fingerprint == fingerprint(CHECKPOINT, "float32")
        assert health.ec_store == (store / "store-id").read_text()
        assert health.engine.startswith("vllm 0.3")
        assert health.takes_image_size


def test_health_of_an_aggregated_instance(aggregated: Server) -> None:
    health = aggregated.health()
    assert (health.role, health.ec_store) == ("aggregated", "")


def test_instances_tell_what_they_have_measured_of_their_costs(encoder: Server, pd: Server, aggregated: Server) -> None:
    for server in (pd, aggregated):
        costs = server.health().costs
        assert costs is not None
        assert min(costs.prefill_seconds_per_token, costs.decode_step_seconds) > 0
        assert costs.beside_streams > 1
    known = encoder.health().costs
    assert known is not None
    assert not known.prefill_seconds_per_token
    assert all(one.tokens > 0 for one in known.images)


@pytest.mark.parametrize("stream", [False, True])
def test_what_a_prompt_has_cost_is_told_in_the_head(pd: Server, aggregated: Server, stream: bool) -> None:
    for server in (pd, aggregated):
        response = server.post(chat(f"{stream} and something to read: " * 20, max_tokens=3, stream=stream))
        told = {one.name: one.seconds or 0.0 for one in read_timing(response.headers["server-timing"])}
        assert 0 < told["prefill_work"] <= told["prefill"] + CLOCKS_SECONDS
        assert PREFILL_WORK not in response.text


def test_a_bad_size_is_refused(pd: Server) -> None:
    response = pd.post(chat(embeds_part("ab" * 32, {"image_size": [96, 0]}), "what?"))
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_other_paths_are_vllms_own(pd: Server) -> None:
    models = CLIENT.get(f"{pd.url}/v1/models", timeout=CALL_SECONDS)
    assert models.json()["data"][0]["id"] == MODEL
    version = CLIENT.get(f"{pd.url}/version", timeout=CALL_SECONDS)
    assert version.json()["version"].startswith("0.3")
