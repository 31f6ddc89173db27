"""What the proxy relies on in an instance, asked of the fakes in these tests and of real instances alike.

A fake that drifts from the real thing, or an instance that changes what it says, fails here.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec
import pytest

from chiasm.bench import synthetic
from chiasm.fleet_key import FleetKey, make_fleet_key
from chiasm.http.fleet_calls import body_digest, signature
from chiasm.launch import Deployment, DeploymentConfig, RoleConfig
from chiasm.media import identifier
from chiasm.wire import (
    CHAT_PATH,
    KV_COMMENT,
    LOST_PATH,
    PLACES_PATH,
    TIMING_COMMENT,
    ECItem,
    ECPlace,
    EmbeddingPlaces,
    ErrorBody,
    Health,
    KVTransferParams,
    LossQuestion,
    Role,
)
from tests.fleet import FORKS

from .conftest import Answer, data_url, image_bytes
from .instances import MODEL, FakeInstance, kv_unavailable, refuse

ROLES = (Role.ENCODER, Role.PREFILL, Role.DECODE)
ASKED = {"do_remote_decode": True, "continues": True}
IMAGE = image_bytes(size=(64, 64))


@dataclass
class Instances:
    """One encoder, one prefill and one decode instance."""

    urls: dict[Role, str]
    session: aiohttp.ClientSession
    fakes: dict[Role, FakeInstance]
    """Empty if the instances are real."""
    fleet_key: FleetKey

    async def health(self, role: Role) -> Answer:
        async with self.session.get(f"{self.urls[role]}/health") as response:
            return Answer(response.status, response.headers, await response.read())

    async def post(self, role: Role, **body: Any) -> Answer:
        return await self.send(role, CHAT_PATH, msgspec.json.encode(body))

    async def send(self, role: Role, path: str, content: bytes) -> Answer:
        """Send a signed call with this JSON."""
        headers = signature(self.fleet_key, "POST", path, body_digest(content))
        headers["Content-Type"] = "application/json"
        async with self.session.post(self.urls[role] + path, data=content, headers=headers) as response:
            return Answer(response.status, response.headers, await response.read())

    async def ask(self, role: Role, params: Any, **options: Any) -> Answer:
        """Send a greedy request for six tokens to prefill or decode."""
        messages = [{"role": "user", "content": "hello"}]
        body = {"model": MODEL, "messages": messages, "max_tokens": 6, "temperature": 0, "ignore_eos": True}
        return await self.post(role, **(body | {"kv_transfer_params": params} | options))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Real instances, which are processes."""
    config = DeploymentConfig(
        model=str(synthetic.make("qwen3_vl", tmp_path_factory.mktemp("contract") / MODEL)),
        roles={role: RoleConfig(count=1, threads=1) for role in ROLES},
        served_model_name=MODEL,
        settings={"kv_cache_bytes": 16 << 20, "max_model_len": 512},
    )
    with Deployment(config, forks=FORKS) as deployment:
        deployment.wait_ready(180)
        yield deployment


@pytest.fixture(params=["fake", "real"])
async def instances(request: pytest.FixtureRequest) -> AsyncIterator[Instances]:
    async with aiohttp.ClientSession() as session:
        if request.param == "real":
            deployment: Deployment = request.getfixturevalue("real")
            urls = {role: deployment.urls(role)[0] for role in ROLES}
            yield Instances(urls, session, {}, deployment.fleet_key)
            return
        fakes = {role: await FakeInstance(role).start() for role in ROLES}
        yield Instances({role: fake.url for role, fake in fakes.items()}, session, fakes, FleetKey([make_fleet_key()]))
        for fake in fakes.values():
            await fake.kill()


@pytest.mark.parametrize("role", ROLES)
async def test_health_reports_what_the_proxy_decides_by(instances: Instances, role: Role) -> None:
    answer = await instances.health(role)
    assert answer.status == 200
    assert set(answer.json) <= set(Health.__struct_fields__)
    health = msgspec.json.decode(answer.body, type=Health)
    assert (health.status, health.role, health.model) == ("ok", role, MODEL)
    assert re.fullmatch("[0-9a-f]{64}", health.fingerprint)
    assert health.version
    assert not health.engine
    assert health.takes_image_size
    if role in {Role.ENCODER, Role.PREFILL}:
        assert health.ec_store or health.ec_connector  # a folder, or memory to memory
    if role in {Role.PREFILL, Role.DECODE}:
        assert health.kv_connector == "SharedMemoryConnector"
        assert health.kv_blocks_total
        assert health.kv_blocks_free == health.kv_blocks_total
        assert health.max_num_seqs
        assert health.max_model_len


async def test_an_encoder_names_every_image_once_with_its_places_and_metadata(instances: Instances) -> None:
    health = msgspec.json.decode((await instances.health(Role.ENCODER)).body, type=Health)
    name = identifier(IMAGE, fingerprint=health.fingerprint)
    part = {"type": "image_url", "image_url": {"url": data_url(IMAGE)}, "uuid": name}
    messages = [{"role": "user", "content": [part, part]}]
    answer = await instances.post(Role.ENCODER, model=MODEL, messages=messages, max_tokens=1, stream=False)
    assert answer.status == 200, answer.body
    published = msgspec.convert(answer.json["ec_transfer_params"], dict[str, Any])
    assert list(published) == [name]
    item = msgspec.json.decode(json.dumps(published[name]), type=ECItem)
    assert item.item_indices == [0, 1]
    assert "image_grid_thw" in json.loads(bytes(item.metadata))
    assert "encode;dur=" in answer.headers["Server-Timing"]


def handle_in(answer: Answer) -> dict[str, Any]:
    """The handle that ends a stream, or that is in a whole answer; empty if there is none."""
    if not answer.headers["Content-Type"].startswith("text/event-stream"):
        return dict(answer.json.get("kv_transfer_params") or {})
    last = answer.body.removesuffix(b"\n\n").split(b"\n\n")[-1].decode()
    return dict(json.loads(last.removeprefix(f": {KV_COMMENT} "))) if last.startswith(f": {KV_COMMENT} ") else {}


def texts_in(answer: Answer) -> list[str]:
    """The pieces of text in a stream."""
    data = [line.removeprefix("data: ") for line in answer.body.decode().splitlines() if line.startswith("data: {")]
    deltas = [choice["delta"] for chunk in map(json.loads, data) for choice in chunk["choices"]]
    return [delta["content"] for delta in deltas if delta.get("content")]


@pytest.mark.parametrize("stream", [False, True])
async def test_prefill_ends_with_a_handle(instances: Instances, stream: bool) -> None:
    answer = await instances.ask(Role.PREFILL, ASKED, stream=stream)
    assert answer.status == 200, answer.body
    assert b"[DONE]" not in answer.body
    assert "prefill;dur=" in answer.headers["Server-Timing"]
    handle = msgspec.convert(handle_in(answer), KVTransferParams)
    assert handle.do_remote_prefill
    assert handle.remote_engine_id
    assert handle.remote_block_ids
    assert handle.remote_request_id
    assert handle.digest
    assert handle.num_tokens
    assert handle.created
    assert len(handle.output_token_ids) == 1
    assert not handle.prompts


@pytest.mark.parametrize("stream", [False, True])
async def test_prefill_gives_no_handle_if_its_token_ends_the_answer(instances: Instances, stream: bool) -> None:
    answer = await instances.ask(Role.PREFILL, ASKED, stream=stream, max_tokens=1)
    assert answer.status == 200, answer.body
    assert handle_in(answer) == {}
    assert (b"data: [DONE]" in answer.body) is stream


async def test_prefill_continues_from_tokens_that_were_sent(instances: Instances) -> None:
    first = handle_in(await instances.ask(Role.PREFILL, ASKED, stream=True))
    sent = {name: first[name] for name in ("output_token_ids", "created", "seed") if name in first}
    second = handle_in(await instances.ask(Role.PREFILL, ASKED | sent | {"num_sent": 1}, stream=True))
    assert second["output_token_ids"][:1] == first["output_token_ids"]
    assert len(second["output_token_ids"]) == 2
    assert second["created"] == first["created"]


async def test_decode_continues_a_stream_and_announces_its_tokens(instances: Instances) -> None:
    first = await instances.ask(Role.PREFILL, ASKED, stream=True)
    answer = await instances.ask(Role.DECODE, handle_in(first) | {"continues": True, "num_sent": 1}, stream=True)
    assert answer.status == 200, answer.body
    assert b'"role"' not in answer.body
    announced = re.findall(rb"^: tokens((?: \d+)+) ?$", answer.body, re.MULTILINE)
    assert len([token for line in announced for token in line.split()]) >= len(texts_in(answer)) > 0
    blocks = answer.body.removesuffix(b"\n\n").split(b"\n\n")
    assert blocks[-1] == b"data: [DONE]"
    assert blocks[-2].startswith(f": {TIMING_COMMENT} ".encode())


async def test_decode_gives_a_whole_answer(instances: Instances) -> None:
    first = await instances.ask(Role.PREFILL, ASKED)
    answer = await instances.ask(Role.DECODE, handle_in(first) | {"continues": True})
    assert answer.status == 200, answer.body
    (choice,) = answer.json["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"]
    assert choice["finish_reason"] in {"stop", "length"}


async def test_decode_reports_lost_kv(instances: Instances) -> None:
    handle = handle_in(await instances.ask(Role.PREFILL, ASKED, stream=True)) | {"continues": True, "num_sent": 1}
    if instances.fakes:
        instances.fakes[Role.DECODE].answer = kv_unavailable
    answer = await instances.ask(Role.DECODE, handle | {"remote_request_id": "none"}, stream=True)
    error = msgspec.json.decode(answer.body, type=ErrorBody).error
    assert (answer.status, error.type, error.code) == (503, "kv_unavailable_error", "kv_unavailable")
    assert error.message


async def test_prefill_is_told_where_embeddings_are(instances: Instances) -> None:
    place = ECPlace(host="127.0.0.1", port=1, engine_id="e")
    told = EmbeddingPlaces(places={"a" * 64: place}, stored=["b" * 64])
    answer = await instances.send(Role.PREFILL, PLACES_PATH, msgspec.json.encode(told))
    assert (answer.status, answer.body) == (204, b"")


async def test_a_question_about_losses_at_prefill_waits_until_its_asker_asks_again(instances: Instances) -> None:
    question = LossQuestion(asker="proxy", published=["a" * 64], seconds=60)
    waiting = asyncio.create_task(instances.send(Role.PREFILL, LOST_PATH, msgspec.json.encode(question)))
    nothing = msgspec.json.encode(LossQuestion(asker="proxy"))
    async with asyncio.timeout(50):  # the question itself ends later
        while not waiting.done():  # it may not have arrived yet
            answer = await instances.send(Role.PREFILL, LOST_PATH, nothing)
            assert (answer.status, answer.json) == (200, {"identifiers": []})
    assert ((await waiting).status, (await waiting).json) == (200, {"identifiers": []})


@pytest.mark.parametrize("role", ROLES)
async def test_a_refusal_has_a_status_and_the_shape_of_the_openai_api(instances: Instances, role: Role) -> None:
    if instances.fakes:
        instances.fakes[role].answer = refuse(400, "messages must be an array")
    answer = await instances.post(role, model=MODEL, messages=3)
    assert answer.status == 400
    assert set(answer.error) == {"message", "type", "param", "code"}
    assert answer.error["type"] == "invalid_request_error"
    assert answer.error["message"]
