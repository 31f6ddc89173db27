"""Probes, states, and how /health, /metrics and /v1/models show them."""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
from pathlib import Path
from typing import Any

import pytest
from msgspec import to_builtins

from chiasm.http.listen import bind
from chiasm.wire import Health

from .conftest import Start, ask, image, image_bytes
from .instances import MODEL, FakeInstance

CERTIFICATES = Path(__file__).parents[1] / "media/certificates"


async def test_health_lists_every_instance(start: Start) -> None:
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")
    front = await start([encoder, pd])
    answer = await front.get("/health")
    assert answer.status == 200
    assert answer.json["status"] == "ok"
    assert answer.json["models"] == [MODEL]
    for number, (instance, shown) in enumerate(zip([pd, encoder], answer.json["instances"], strict=True), 1):
        assert shown == {
            "url": instance.url,
            "role": instance.role,
            "state": "healthy",
            "reason": None,
            "model": MODEL,
            "version": "1",
            "engine": None,
            "outstanding_work": 0.0,
            "in_flight": 0,
            "number": number,
            "costs": {"prefill_seconds_per_token": 0.0001},
            "sources": ["options"],
        }


async def test_an_instance_that_was_never_reachable_is_starting(start: Start) -> None:
    pd = FakeInstance("pd")
    await pd.start()
    url = pd.url
    await pd.kill()
    front = await start([], pds=(url,))
    assert (await front.states()) == {url: "starting"}
    health = await front.get("/health")
    assert health.status == 503
    assert health.json["status"] == "unavailable"
    assert health.json["instances"][0]["reason"]
    assert (await front.post(ask("x"))).error["code"] == "no_pd"
    await pd.start()
    await front.until(pd, "healthy")
    assert (await front.post(ask("x"))).status == 200
    await pd.kill()


@pytest.mark.parametrize(
    ("scheme", "host", "says", "reason"),
    [
        ("http", "127.0.0.1", None, "Connection refused"),
        ("http", "nowhere.invalid", None, "is not known to the name service"),
        ("http", "127.0.0.1", "nonsense", "does not answer in HTTP"),
        ("https", "127.0.0.1", "nonsense", "does not speak TLS"),
        ("https", "127.0.0.1", "TLS", r"is not trusted \(self-signed certificate\); .* SSL_CERT_FILE"),
    ],
)
async def test_an_instance_that_cannot_be_probed_is_shown_with_the_reason(
    start: Start, scheme: str, host: str, says: str | None, reason: str
) -> None:
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"What do you want?\r\n\r\n")
        writer.close()

    context = None
    if says == "TLS":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(CERTIFICATES / "self_signed.pem", CERTIFICATES / "key.pem")
    with bind("127.0.0.1", 0, listening=False) as held:
        port = held.getsockname()[1]
        server = None
        if says:
            server = await asyncio.start_server(speak, sock=bind("127.0.0.1", port), ssl=context)
        front = await start([], pds=(f"{scheme}://{host}:{port}",))
        shown = "not probed yet"
        async with asyncio.timeout(60):
            while shown == "not probed yet":
                shown = (await front.get("/health")).json["instances"][0]["reason"]
        if server is not None:
            server.close()
    assert re.search(reason, shown)


async def test_probes_make_an_instance_unhealthy_and_healthy_again(start: Start) -> None:
    pds = [FakeInstance("pd"), FakeInstance("pd")]
    front = await start([*pds])
    pds[0].health_status = 503
    pds[0].health = Health(status="failed", message="the engine has stopped")
    await front.until(pds[0], "unhealthy")
    shown = {one["url"]: one for one in (await front.get("/health")).json["instances"]}[pds[0].url]
    assert shown["reason"] == "/health answered with status 503 (failed: the engine has stopped)"
    for _ in range(3):
        assert (await front.post(ask("x"))).status == 200
    assert not pds[0].received
    pds[0].health_status = 200
    pds[0].health = pds[1].health
    await front.until(pds[0], "healthy")
    for _ in range(2):
        assert (await front.post(ask("x"))).status == 200
    assert pds[0].received


async def test_an_instance_that_stops_answering_probes_is_unhealthy(start: Start) -> None:
    pd = FakeInstance("pd")
    front = await start([pd], probe_timeout_seconds=0.2)
    pd.awake.clear()
    await front.until(pd, "unhealthy")
    shown = (await front.get("/health")).json["instances"][0]
    assert "within 0.2 s" in shown["reason"]
    pd.awake.set()
    await front.until(pd, "healthy")


async def test_one_late_probe_changes_nothing(start: Start) -> None:
    pd = FakeInstance("pd")
    front = await start([pd], probe_timeout_seconds=0.2, probe_interval_seconds=60)
    pd.unanswered_probes = 1
    await front.service.prober.check(front.service.fleet.instances[0])
    assert (await front.states()) == {pd.url: "healthy"}
    assert (await front.post(ask("x"))).status == 200


async def test_a_restart_at_the_same_url_is_noticed(start: Start) -> None:
    pd = FakeInstance("pd")
    front = await start([pd])
    await pd.kill()
    await front.until(pd, "unhealthy")
    await pd.start()
    await front.until(pd, "healthy")
    assert (await front.post(ask("x"))).status == 200


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"role": "pd"}, "role"),
        ({"model": "other"}, "other"),
        ({"fingerprint": "e" * 64}, "fingerprint"),
        ({"ec_store": "elsewhere"}, "store"),
    ],
)
async def test_an_instance_that_does_not_fit_is_never_used(start: Start, change: dict[str, Any], reason: str) -> None:
    bad, good, pd = FakeInstance("encoder", **change), FakeInstance("encoder"), FakeInstance("pd")
    front = await start([bad, good, pd])
    shown = {one["url"]: one for one in (await front.get("/health")).json["instances"]}[bad.url]
    assert shown["state"] == "mismatched"
    assert reason in shown["reason"]
    for n in range(1, 4):
        assert (await front.post(ask(image(image_bytes(size=(5, n)))))).status == 200
    assert not bad.received
    bad.health = good.health
    await front.until(bad, "healthy")


async def test_changes_of_state_are_logged_with_their_reason(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "chiasm.proxy.probe")
    pd, bad = FakeInstance("pd"), FakeInstance("encoder", dtype="float16", fingerprint="e" * 64)
    pd.health = Health(**{**to_builtins(pd.health), "dtype": "bfloat16"})
    front = await start([pd, bad])
    await front.until(bad, "mismatched")
    before = bad.probes
    while bad.probes < before + 3:
        await front.get("/health")
    await pd.kill()
    await front.until(pd, "unhealthy")
    lines = [(one.levelname, one.getMessage()) for one in caplog.records]
    differs = f"encoder {bad.url} is mismatched: its dtype is float16, but the fleet's is bfloat16"
    assert lines.count(("WARNING", differs)) == 1
    assert ("INFO", f"pd {pd.url} is healthy") in lines
    assert any(level == "WARNING" and text.startswith(f"pd {pd.url} is unhealthy: ") for level, text in lines)


async def test_what_one_report_changes_elsewhere_is_logged_too(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    """When the last instance with the old model is gone, those with the new one fit."""
    caplog.set_level(logging.INFO, "chiasm.proxy.probe")
    old, new = FakeInstance("pd"), FakeInstance("pd", model="new")
    front = await start([old, new])
    await front.until(new, "mismatched")
    await old.kill()
    await front.until(new, "healthy")
    assert f"pd {new.url} is mismatched: it serves new, but the fleet serves {MODEL}" in caplog.text
    assert f"pd {new.url} is healthy" in caplog.text


async def test_a_decode_instance_with_another_connector_is_never_used(start: Start) -> None:
    p, good, bad = FakeInstance("prefill"), FakeInstance("decode"), FakeInstance("decode", kv_connector="Other")
    front = await start([p, good, bad])
    assert (await front.states())[bad.url] == "mismatched"
    for _ in range(3):
        assert (await front.post(ask("x"))).status == 200
    assert not bad.received


async def test_prefill_and_decode_may_report_less(start: Start) -> None:
    unsaid = dict.fromkeys(("kv_connector", "kv_blocks_total", "kv_blocks_free", "max_num_seqs"))
    front = await start([FakeInstance("prefill", **unsaid), FakeInstance("decode", **unsaid)])
    assert (await front.post(ask("x"))).status == 200


@pytest.mark.parametrize("health", [{"status": "starting"}, {"role": None}, {"model": 3}])
async def test_a_bad_health_answer_is_not_healthy(start: Start, health: dict[str, Any]) -> None:
    front = await start([FakeInstance("pd", **health)])
    shown = (await front.get("/health")).json["instances"][0]
    assert shown["state"] == "starting"
    assert "/health" in shown["reason"]


async def test_models_lists_what_requests_can_ask_for(start: Start) -> None:
    pd = FakeInstance("pd")
    front = await start([pd])
    listed = (await front.get("/v1/models")).json
    assert listed["object"] == "list"
    assert [(model["id"], model["max_model_len"]) for model in listed["data"]] == [(MODEL, 4096)]
    assert (await front.get(f"/v1/models/{MODEL}")).json["id"] == MODEL
    assert (await front.get("/v1/models/other")).error["type"] == "not_found_error"
    await pd.kill()
    await front.until(pd, "unhealthy")
    assert (await front.get("/v1/models")).json["data"] == []


async def test_metrics_count_what_happened(start: Start) -> None:
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")
    front = await start([encoder, pd])
    await front.post(ask("x"))
    await front.post(ask(image("http://[::1]/")))
    await front.post(b"{", "/v1/completions")
    page = await front.get("/metrics")
    assert page.headers["Content-Type"].startswith("text/plain")
    chat, completions = "/v1/chat/completions", "/v1/completions"
    assert await front.metric(f'chiasm_proxy_requests_total{{route="{chat}",status="200"}}') == 1
    assert await front.metric(f'chiasm_proxy_requests_total{{route="{chat}",status="400"}}') == 1
    assert await front.metric(f'chiasm_proxy_requests_total{{route="{completions}",status="400"}}') == 1
    assert await front.metric('chiasm_proxy_items_total{outcome="refused"}') == 1
    assert await front.metric("chiasm_proxy_requests_in_flight") == 0
    assert await front.metric('chiasm_proxy_overhead_seconds_count{kind="text"}') == 1
    assert await front.metric(f'chiasm_proxy_instance_healthy{{role="pd",url="{pd.url}"}}') == 1
    assert await front.metric(f'chiasm_proxy_instance_outstanding_work{{role="encoder",url="{encoder.url}"}}') == 0
    assert await front.metric("process_resident_memory_bytes") > 0


async def test_metrics_say_that_a_role_is_missing_also_when_no_instance_is_known(start: Start) -> None:
    pd = FakeInstance("pd")
    front = await start([pd])
    assert await front.metric("chiasm_proxy_ready") == 1
    front.service.membership.remove(pd.url)
    assert await front.states() == {}
    assert await front.metric("chiasm_proxy_ready") == 0


async def test_no_label_comes_from_a_client(start: Start) -> None:
    front = await start([FakeInstance("pd")])
    await front.post(ask("x", model="evil-model"), **{"X-Request-Id": "evil-id"})
    await front.get("/evil-path")
    await front.post(ask(image("http://evil-host.invalid/")))
    assert b"evil" not in (await front.get("/metrics")).body
