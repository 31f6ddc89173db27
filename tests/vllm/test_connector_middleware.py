"""vLLM's HTTP server with chiasm's middleware."""

from __future__ import annotations

from pathlib import Path

from chiasm.models.identity import fingerprint

from .processes import CALL_SECONDS, CHECKPOINT, CLIENT, MODEL, Server
from .wire import chat, embeds_part


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


def test_a_bad_size_is_refused(pd: Server) -> None:
    response = pd.post(chat(embeds_part("ab" * 32, {"image_size": [96, 0]}), "what?"))
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_other_paths_are_vllms_own(pd: Server) -> None:
    models = CLIENT.get(f"{pd.url}/v1/models", timeout=CALL_SECONDS)
    assert models.json()["data"][0]["id"] == MODEL
    version = CLIENT.get(f"{pd.url}/version", timeout=CALL_SECONDS)
    assert version.json()["version"].startswith("0.3")
