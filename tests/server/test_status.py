"""What an instance says about itself."""

from __future__ import annotations

import os

import msgspec
import pytest

from chiasm import __version__
from chiasm.errors import StorageError
from chiasm.http.config import HttpConfig
from chiasm.launch.ports import load_progress
from chiasm.models.base import LoadProgress
from chiasm.server.app import app_of, create_app
from chiasm.server.config import ServerConfig
from chiasm.server.context import ServerContext
from chiasm.wire import ECPlace, Health, ModelCard, Role
from tests.server.conftest import Served, ServedEncoder
from tests.server.fake_engine import FakeLanguageEngine
from tests.server.images import chat
from tests.server.serving import eventually, get, post, request, serving


def test_health_has_what_the_proxy_needs(pd: Served) -> None:
    reply = get(f"{pd.url}/health")
    assert reply.status == 200
    health = reply.json
    assert len(health.pop("incarnation")) == 32
    assert health.pop("load")["kv_blocks_free"] == 5
    assert health == {
        "status": "ok",
        "role": "pd",
        "model": "bytes",
        "fingerprint": "f1" * 16,
        "dtype": "float32",
        "ec_store": "store-1",
        "ec_connector": "SharedStorageConnector",
        "version": __version__,
        "max_model_len": 512,
        "longest_token": 5,
        "max_items": 3,
        "max_body_bytes": 400_000,
        "device": "cpu",
        "threads": 2,
        "cpus": sorted(os.sched_getaffinity(0)),
        "device_id": "host/cpu:0,1",
        "costs": {"prefill_seconds_per_token": 0.001, "decode_step_seconds": 0.01},
    }


def test_health_of_an_encoder_says_where_its_embeddings_are(encoder: ServedEncoder) -> None:
    health = msgspec.json.decode(get(f"{encoder.url}/health").body, type=Health)
    assert health.ec_place == ECPlace(host="e.example", port=7002, engine_id="engine-e")
    assert health.ec_connector == "SharedStorageConnector"


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_health_of_prefill_and_decode_has_their_capacity(request: pytest.FixtureRequest, role: str) -> None:
    served: Served = request.getfixturevalue(role)
    health = get(f"{served.url}/health").json
    assert health["role"] == role
    assert health["kv_connector"] == "SharedMemoryConnector"
    assert (health["kv_blocks_total"], health["kv_blocks_free"]) == (8, 5)
    assert health["max_num_seqs"] == 64


@pytest.mark.parametrize(("role", "is_idle"), [(Role.PREFILL, False), (Role.PD, True)])
async def test_an_instance_whose_kv_is_yet_to_be_fetched_is_not_idle(role: Role, is_idle: bool) -> None:
    context = ServerContext("bytes", ServerConfig(), FakeLanguageEngine(role))
    context.drain()
    assert context.is_idle is is_idle


def test_a_loading_instance_says_how_far_it_is() -> None:
    context = ServerContext("bytes", ServerConfig())
    with serving(app_of(context)) as url:
        assert load_progress(url) == ""
        context.progress = LoadProgress(3, 10)
        eventually(lambda: load_progress(url) == "3/10 tensors")  # it asks once, and waits only for a moment
        health = get(f"{url}/health").json
        assert health == {
            "status": "starting",
            "incarnation": context.incarnation,
            "loaded_tensors": 3,
            "tensors": 10,
        }


def test_a_loading_instance_answers_503() -> None:
    context = ServerContext("bytes", ServerConfig())
    with serving(app_of(context)) as url:
        health = get(f"{url}/health")
        assert (health.status, health.json) == (503, {"status": "starting", "incarnation": context.incarnation})
        reply = post(f"{url}/v1/chat/completions", chat("x"))
        assert reply.status == 503
        assert reply.headers["retry-after"] == "1"
        assert reply.error["code"] == "starting"
        assert get(f"{url}/v1/models").status == 503
        assert b"chiasm_up 0.0" in get(f"{url}/metrics").body


def test_health_shows_that_the_engine_has_died(pd: Served) -> None:
    pd.engine.healthy = False
    reply = get(f"{pd.url}/health")
    assert reply.status == 503
    assert reply.json["status"] == "failed"
    assert reply.json["role"] == "pd"


def test_an_unreachable_store_makes_an_encoder_fail_and_leaves_text_to_the_others(
    encoder: ServedEncoder, pd: Served
) -> None:
    for served, status in ((encoder, 503), (pd, 200)):
        served.engine.store_error = StorageError("cannot read the store-id of /gone")
        reply = get(f"{served.url}/health")
        assert reply.status == status
        health = msgspec.json.decode(reply.body, type=Health)
        assert (health.ec_store, health.message) == ("", "cannot read the store-id of /gone")
        served.engine.store_error = None
        assert get(f"{served.url}/health").json["ec_store"] == "store-1"


def test_models_lists_the_model(pd: Served) -> None:
    assert [model.id for model in pd.client.models.list()] == ["bytes"]
    assert pd.client.models.retrieve("bytes").owned_by == "chiasm"
    assert get(f"{pd.url}/v1/models/other").status == 404
    (card,) = get(f"{pd.url}/v1/models/").json["data"]
    assert set(card) == set(ModelCard.__struct_fields__)
    assert (card["root"], card["parent"], card["max_model_len"]) == ("bytes", None, 512)
    assert card["permission"][0]["object"] == "model_permission"


def test_an_instance_may_need_a_key_and_says_so() -> None:
    config = ServerConfig(http=HttpConfig(api_key=("k" * 16,)))
    with serving(create_app(FakeLanguageEngine(Role.PD), served_model_name="bytes", config=config)) as url:
        assert get(f"{url}/health").json["needs_key"] is True
        assert get(f"{url}/v1/models").status == 401
        assert request("GET", f"{url}/v1/models", headers={"Authorization": f"Bearer {'k' * 16}"}).status == 200


def test_timing_in_a_stream_can_be_left_out(pd: Served) -> None:
    body = chat("x", stream=True)
    assert any("server-timing" in one for one in post(pd.chat, body).comments)
    assert post(pd.chat, body, {"X-Timing-Comments": "off"}).comments == []


def test_version(pd: Served) -> None:
    assert get(f"{pd.url}/version").json == {"version": __version__}


def test_metrics_show_the_engine_and_the_requests(pd: Served) -> None:
    post(pd.chat, chat("x"))
    post(pd.chat, {})
    reply = get(f"{pd.url}/metrics")
    assert reply.headers["content-type"].startswith("text/plain")
    lines = reply.body.decode().splitlines()
    for line in (
        "chiasm_up 1.0",
        "chiasm_requests_running 2.0",
        "chiasm_kv_blocks 8.0",
        "chiasm_generation_tokens_total 11.0",
        'chiasm_items_total{outcome="hit"} 3.0',
        "chiasm_ec_loads_total 4.0",
        "chiasm_http_requests_in_flight 0.0",
    ):
        assert line in lines
    names = {line.split("{")[0].split(" ")[0] for line in lines if not line.startswith("#")}
    assert all(name.startswith("chiasm_") for name in names)
    assert {"chiasm_time_to_first_token_seconds_count", "chiasm_inter_token_seconds_sum"} <= names
    assert any('path="/v1/chat/completions",status="200"' in line for line in lines)
    assert any('path="/v1/chat/completions",status="400"' in line for line in lines)


def test_metrics_show_kv_transfers(prefill: Served, pd: Served) -> None:
    lines = get(f"{prefill.url}/metrics").body.decode().splitlines()
    for line in (
        "chiasm_kv_transfers_total 5.0",
        "chiasm_kv_transferred_bytes_total 640.0",
        "chiasm_kv_transfer_seconds_total 0.0",
        "chiasm_kv_claim_seconds_total 0.0",
        "chiasm_kv_failures_total 0.0",
        "chiasm_kv_leases_held 1.0",
        "chiasm_kv_leases_expired_total 0.0",
    ):
        assert line in lines
    assert b"chiasm_kv_transfers" not in get(f"{pd.url}/metrics").body
