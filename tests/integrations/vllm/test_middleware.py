"""The middleware around an application that responds as vLLM's does, with the real demo checkpoint."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import shutil
import sys
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, ModuleType, SimpleNamespace
from typing import Any

import msgspec
import pytest
from starlette.types import Message, Receive, Scope, Send

from chiasm import __version__, checkpoints
from chiasm.ec_transfer.losses import LossWatch
from chiasm.errors import Code
from chiasm.fleet_key import FleetKey, make_fleet_key
from chiasm.http.fleet_calls import body_digest, signature
from chiasm.http.limits import Limit
from chiasm.integrations.vllm import middleware
from chiasm.integrations.vllm.messages import (
    AWAITED_METHOD,
    EXPECT_METHOD,
    LOAD_METHOD,
    LOST_METHOD,
    MISSING_METHOD,
    PLACE_METHOD,
    Exchange,
)
from chiasm.integrations.vllm.middleware import ChiasmMiddleware
from chiasm.models import load_processor
from chiasm.models.identity import fingerprint
from chiasm.wire import (
    AWAITED_PATH,
    CHAT_PATH,
    COMPLETIONS_PATH,
    LOST_PATH,
    PLACES_PATH,
    ECPlace,
    EmbeddingPlaces,
    Health,
    Load,
    Role,
)

CHECKPOINT = checkpoints.folder("demo")
NAME = "ab" * 32


@dataclass
class VLLM:
    """vLLM's application as far as the middleware sees it."""

    config: SimpleNamespace
    status: int = 200
    bodies: list[bytes] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    lengths: list[str] = field(default_factory=list)
    encodings: list[bytes | None] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.paths.append(scope["path"])
        self.lengths.append(dict(scope["headers"]).get(b"content-length", b"").decode())
        self.encodings.append(dict(scope["headers"]).get(b"content-encoding"))
        body, more = b"", scope["method"] == "POST"
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.bodies.append(body)
        await send({"type": "http.response.start", "status": self.status, "headers": [(b"x-from", b"vllm")]})
        await send({"type": "http.response.body", "body": b"" if scope["path"] == "/health" else b"answered"})


@dataclass
class Answer:
    status: int
    headers: dict[bytes, bytes]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Server:
    """vLLM's server: its application, its state, and the middleware."""

    def __init__(self, vllm: VLLM, *, api_key: list[str] | None = None, **options: Any) -> None:
        arguments = SimpleNamespace(served_model_name=["demo", "other"], model=str(CHECKPOINT), api_key=api_key)
        client = SimpleNamespace(errored=False)
        self.app = SimpleNamespace(state=SimpleNamespace(vllm_config=vllm.config, args=arguments, engine_client=client))
        self.middleware = ChiasmMiddleware(vllm, **options)
        self.left: list[Message] = []
        """What has not been received of the last request."""

    async def call(
        self,
        method: str,
        path: str,
        *chunks: bytes,
        length: int | None = None,
        encoding: bytes | None = None,
        peer: str = "127.0.0.1",
        signed: Mapping[str, str] = MappingProxyType({}),
        leaves: bool = True,
    ) -> Answer:
        """``leaves``: whether the client closes its connection when it has sent everything."""
        headers = [(b"host", b"here"), (b"x-own", b"1")]
        headers += [(name.encode(), value.encode()) for name, value in signed.items()]
        if encoding is not None:
            headers.append((b"content-encoding", encoding))
        if length is not None:
            headers.append((b"content-length", str(length).encode()))
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "headers": headers,
            "app": self.app,
            "client": (peer, 1),
        }
        left = self.left = [
            {"type": "http.request", "body": chunk, "more_body": index < len(chunks) - 1}
            for index, chunk in enumerate(chunks)
        ]
        sent: list[Message] = []

        async def receive() -> Message:
            if not left and not leaves:
                await asyncio.Event().wait()
            return left.pop(0) if left else {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            sent.append(message)

        await self.middleware(scope, receive, send)
        if not sent:
            return Answer(0, {}, b"")
        return Answer(sent[0]["status"], dict(sent[0]["headers"]), b"".join(each["body"] for each in sent[1:]))

    async def chat(self, *chunks: bytes) -> Answer:
        return await self.call("POST", CHAT_PATH, *chunks, length=sum(map(len, chunks)))


def role(name: str | None) -> SimpleNamespace | None:
    """vLLM's ECTransferConfig."""
    if name is None:
        return None
    return SimpleNamespace(
        is_ec_producer=name in ("ec_producer", "ec_both"),
        is_ec_consumer=name in ("ec_consumer", "ec_both"),
        ec_connector_module_path="chiasm.integrations.vllm.ec_connector",
        ec_connector_extra_config={},
    )


def config(ec: str | None = None, kv: str | None = None, store: Path | None = None, **model: Any) -> SimpleNamespace:
    """vLLM's VllmConfig."""
    transfer = role(ec)
    if transfer is not None and store is not None:
        transfer.ec_connector_extra_config = {"shared_storage_path": str(store)}
    return SimpleNamespace(
        ec_transfer_config=transfer,
        kv_transfer_config=SimpleNamespace(kv_connector="NixlConnector", kv_role=kv) if kv else None,
        scheduler_config=SimpleNamespace(max_num_seqs=8),
        device_config=SimpleNamespace(device_type="cpu"),
        parallel_config=SimpleNamespace(world_size=2, data_parallel_size=1),
        model_config=SimpleNamespace(
            **{
                "model": str(CHECKPOINT),
                "revision": None,
                "dtype": "torch.float32",
                "max_model_len": 2048,
                "multimodal_config": SimpleNamespace(get_limit_per_prompt=lambda modality: 5),
            }
            | model
        ),
    )


@pytest.fixture(autouse=True)
def loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The middleware finds vLLM loaded."""
    module = ModuleType("vllm")
    module.__dict__["__version__"] = "0.32.0"
    monkeypatch.setitem(sys.modules, "vllm", module)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    folder = tmp_path / "store"
    folder.mkdir(mode=0o700)
    return folder


def ask(*parts: object, **more: object) -> bytes:
    return json.dumps({"model": "demo", "messages": [{"role": "user", "content": list(parts)}], **more}).encode()


def sized(height: int, width: int, name: object = NAME) -> dict[str, object]:
    return {"type": "image_embeds", "image_embeds": {"image_size": [height, width]}, "uuid": name}


# ---- /health -----------------------------------------------------------------------------------------------------------


async def test_health_describes_the_instance(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    answer = await Server(VLLM(config("ec_consumer", store=store))).call("GET", "/health")
    assert (answer.status, answer.headers[b"content-type"]) == (200, b"application/json")
    health = msgspec.json.decode(answer.body, type=Health)
    assert health.incarnation
    assert health.load is not None
    assert health.costs is not None
    assert [(one.pixels, one.tokens, one.encode_seconds) for one in health.costs.images] == [
        (side * side, 16, 0.0) for side in (256, 512, 1024, 2048)
    ]
    assert msgspec.structs.replace(health, incarnation="", load=None, costs=None) == Health(
        role=Role.PD,
        model="demo",
        fingerprint=fingerprint(CHECKPOINT, "float32"),
        dtype="float32",
        ec_store=(store / "store-id").read_text(),
        ec_connector="SharedStorageConnector",
        tells_lost=True,
        version=__version__,
        engine="vllm 0.32.0",
        max_model_len=2048,
        longest_token=16,
        max_items=5,
        max_num_seqs=8,
        device="cpu",
        threads=6,
        cpus=sorted(os.sched_getaffinity(0)),
    )


@pytest.mark.parametrize(
    ("keys", "variable", "needs"),
    [(None, "", False), (["k"], "", True), (None, "k", True), ([""], "", False), ([""], "k", False)],
)
async def test_health_says_whether_requests_need_a_key(
    monkeypatch: pytest.MonkeyPatch, keys: list[str] | None, variable: str, needs: bool
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", variable)
    answer = await Server(VLLM(config()), api_key=keys).call("GET", "/health")
    assert msgspec.json.decode(answer.body, type=Health).needs_key is needs


async def test_a_compressed_body_reaches_vllm_decompressed() -> None:
    vllm = VLLM(config())
    body = b'{"messages": []}'
    sent = gzip.compress(body)
    assert (await Server(vllm).call("POST", CHAT_PATH, sent, length=len(sent), encoding=b"gzip")).status == 200
    assert (vllm.bodies, vllm.lengths, vllm.encodings) == ([body], [str(len(body))], [None])


async def test_health_names_the_current_store(store: Path) -> None:
    server = Server(VLLM(config("ec_consumer", store=store)))
    before = (await server.call("GET", "/health")).json["ec_store"]
    shutil.rmtree(store)
    other = Server(VLLM(config("ec_producer", store=store)))
    made_anew = (await other.call("GET", "/health")).json["ec_store"]
    assert made_anew != before
    assert (await server.call("GET", "/health")).json["ec_store"] == made_anew


@pytest.mark.parametrize("status", [200, 503])
async def test_an_instance_is_ready_while_its_engine_runs_and_alive_while_it_answers(status: int) -> None:
    server = Server(VLLM(config(), status=status))
    assert (await server.call("GET", "/readyz")).status == status
    assert (await server.call("GET", "/livez")).status == 200


@pytest.mark.parametrize(("ec", "status"), [("ec_producer", 503), ("ec_consumer", 200)])
async def test_an_unreachable_store_fails_an_encoder_and_leaves_the_others_for_text(
    store: Path, ec: str, status: int
) -> None:
    no_folder = store / "file"
    no_folder.touch()
    answer = await Server(VLLM(config(ec, store=no_folder))).call("GET", "/health")
    assert answer.status == status
    assert str(no_folder) in answer.json["message"]
    assert not answer.json.get("ec_store")


@pytest.mark.parametrize(
    ("ec", "kv", "expected"),
    [
        ("ec_producer", None, "encoder"),
        ("ec_consumer", None, "pd"),
        ("ec_both", None, "aggregated"),
        (None, None, "aggregated"),
        (None, "kv_both", "aggregated"),
        ("ec_consumer", "kv_producer", "prefill"),
        ("ec_consumer", "kv_consumer", "decode"),
        (None, "kv_consumer", "decode"),
    ],
)
async def test_roles(store: Path, ec: str | None, kv: str | None, expected: str) -> None:
    health = (await Server(VLLM(config(ec, kv, store))).call("GET", "/health")).json
    assert health["role"] == expected
    assert health.get("kv_connector") == ("NixlConnector" if kv else None)


async def test_a_configured_fingerprint_is_used(store: Path) -> None:
    given = config("ec_consumer", store=store)
    given.ec_transfer_config.ec_connector_extra_config["fingerprint"] = "abcd"
    assert (await Server(VLLM(given)).call("GET", "/health")).json["fingerprint"] == "abcd"


def with_settings(store: Path, **settings: object) -> Server:
    """Return a PD whose vLLM got these settings of the processor."""
    given = SimpleNamespace(get_limit_per_prompt=lambda modality: 5, mm_processor_kwargs=settings)
    return Server(VLLM(config("ec_consumer", store=store, multimodal_config=given)))


async def test_other_settings_of_the_processor_make_another_fingerprint(store: Path) -> None:
    given: list[dict[str, object]] = [{}, {"max_pixels": 9216}, {"max_pixels": 4096}, {"device": "cuda"}]
    found = [(await with_settings(store, **one).call("GET", "/health")).json["fingerprint"] for one in given]
    assert found[0] == found[3] == fingerprint(CHECKPOINT, "float32")
    assert len(set(found)) == 3


async def test_images_are_sized_by_encoders_where_the_processor_has_other_settings(store: Path) -> None:
    server = with_settings(store, max_pixels=9216)
    health = msgspec.convert((await server.call("GET", "/health")).json, Health)
    assert (health.takes_image_size, health.image_paths, health.costs) == (False, [], None)
    assert (await server.chat(ask(sized(96, 96)))).status == 400
    assert (await with_settings(store, device="cuda").chat(ask(sized(96, 96)))).status == 200


async def test_a_model_that_chiasm_does_not_know(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    server = Server(VLLM(config(model=str(tmp_path))))
    health = msgspec.convert((await server.call("GET", "/health")).json, Health)
    assert (health.status, health.fingerprint, health.takes_image_size) == ("ok", "", False)
    answer = await server.chat(ask(sized(96, 96)))
    assert answer.status == 400
    assert "cannot tell how many tokens" in answer.json["error"]["message"]


async def test_a_dead_engine_is_a_failure() -> None:
    answer = await Server(VLLM(config(), status=503)).call("GET", "/health")
    assert answer.status == 503
    assert answer.json["status"] == "failed"
    assert answer.json["message"]


async def test_a_store_that_cannot_be_read_is_a_failure_until_it_can(store: Path) -> None:
    (store / "store-id").mkdir()
    server = Server(VLLM(config("ec_producer", store=store)))
    answer = await server.call("GET", "/health")
    assert (answer.status, answer.json["status"]) == (503, "failed")
    (store / "store-id").rmdir()
    assert (await server.call("GET", "/health")).status == 200


# ---- chat completions --------------------------------------------------------------------------------------------------


async def test_a_size_becomes_the_grid_that_the_encoder_will_answer() -> None:
    vllm = VLLM(config())
    assert (await Server(vllm).chat(ask("x", sized(70, 130), {"type": "text", "text": "what?"}))).body == b"answered"
    grid = load_processor(CHECKPOINT).geometry_of_size(70, 130).metadata
    (body,) = vllm.bodies
    assert json.loads(body) == json.loads(
        ask("x", {"type": "image_embeds", "image_embeds": grid, "uuid": NAME}, {"type": "text", "text": "what?"})
    )
    assert vllm.lengths == [str(len(body))]


async def test_everything_but_sizes_keeps_its_bytes() -> None:
    odd = b'{"image_size" : [ 1 ], "x":1.50e0}'
    rest = b'"temperature" :1.0e-1,"x":{"image_size":[7,7]},"y": 12345678901234567890123}'
    part = json.dumps(sized(96, 96)).encode()
    body = b'{"messages":[{"role":"user","content":[%b,{"type":"text","text":"a","z":%b}]},{"role":"user","content":"t"}],%b'
    vllm = VLLM(config())
    await Server(vllm).chat(body % (part, odd, rest))
    assert odd in vllm.bodies[0]
    assert b'"temperature":1.0e-1,"x":{"image_size":[7,7]},"y":12345678901234567890123}' in vllm.bodies[0]
    assert vllm.bodies[0].count(b"image_size") == 2


@pytest.mark.parametrize(
    "body",
    [
        ask("no image", temperature=0),
        ask({"type": "image_embeds", "image_embeds": {"image_grid_thw": [1, 6, 6]}, "uuid": "anything"}),
        b'{"messages" : [ ] }',
        b"no json",
        b'{"image_size": 1',
        b'{"messages": [{"role": "user", "content": [{"image_size": "\xff"}]}]}',
        b'{"messages": {"image_size": 1}}',
        b"[" * 10_000 + b'"image_size"',
    ],
)
async def test_other_bodies_pass_byte_for_byte(body: bytes) -> None:
    vllm = VLLM(config())
    assert (await Server(vllm).chat(body)).body == b"answered"
    assert vllm.bodies == [body]


@pytest.mark.parametrize(
    "part",
    [
        sized(0, 96),
        sized(96, 1 << 21),
        sized(1, 5000),
        {"type": "image_embeds", "image_embeds": {"image_size": ["96", 96]}, "uuid": NAME},
        {"type": "image_embeds", "image_embeds": {"image_size": [96]}, "uuid": NAME},
        {"type": "image_embeds", "image_embeds": {"image_size": [96, 96], "more": 1}, "uuid": NAME},
        sized(96, 96, "../escaped"),
        sized(96, 96, None),
        sized(96, 96, ["list"]),
    ],
)
async def test_a_bad_size_or_name_is_refused(part: dict[str, object]) -> None:
    vllm = VLLM(config())
    answer = await Server(vllm).chat(ask(part))
    assert answer.status == 400
    assert answer.json["error"]["type"] == "invalid_request_error"
    assert vllm.bodies == []


async def test_names_are_checked_if_chiasms_connector_looks_for_them(store: Path) -> None:
    vllm = VLLM(config("ec_consumer", store=store))
    grid = {"type": "image_embeds", "image_embeds": {"image_grid_thw": [1, 6, 6]}}
    assert (await Server(vllm).chat(ask({**grid, "uuid": "../escaped"}))).status == 400
    assert vllm.bodies == []
    good = ask({**grid, "uuid": NAME})
    assert (await Server(vllm).chat(good)).status == 200
    assert vllm.bodies == [good]


async def test_an_error_of_a_request_with_embeddings_is_explained() -> None:
    server = Server(VLLM(config(), status=500))
    answer = await server.chat(ask(sized(96, 96)))
    assert answer.status == 503
    assert answer.json["error"]["type"] == "embedding_unavailable_error"
    assert answer.headers[b"retry-after"] == b"1"
    other = await server.chat(ask("no image"))
    assert (other.status, other.body) == (500, b"answered")


ROLE, TOKEN, END = b'data: {"choices": [{"delta": {"role": "assistant"}}]}', b'data: {"choices": []}', b"data: [DONE]"
FAILURE = b'data: {"error": {"message": "Internal server error", "code": 500}}'


class Streaming:
    """vLLM's application and the client of its engine. A stream begins with the role at the first output, whatever that is."""

    errored, log_stats = False, True

    def __init__(self, *reasons: str | None) -> None:
        """``reasons`` are why each output is the last."""
        self._reasons = reasons

    async def generate(self, prompt: Any, sampling_params: Any, request_id: str) -> AsyncGenerator[Any, None]:
        for reason in self._reasons:
            times = SimpleNamespace(scheduled_ts=0.0, first_token_ts=0.0, last_token_ts=0.0)
            yield SimpleNamespace(outputs=[SimpleNamespace(finish_reason=reason)], metrics=times)

    async def encode(self, *arguments: Any) -> AsyncGenerator[Any, None]:
        raise NotImplementedError
        yield

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write(line: bytes) -> None:
            await send({"type": "http.response.body", "body": line, "more_body": line != END})

        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        is_first = True
        async for output in self.generate(None, SimpleNamespace(), "chat"):
            if is_first:
                await write(ROLE)
            is_first = False
            await write(FAILURE if output.outputs[0].finish_reason == "error" else TOKEN)
        await write(END)


async def stream_of(*reasons: str | None) -> Answer:
    vllm: Any = Streaming(*reasons)
    vllm.config = config()
    server = Server(vllm)
    server.app.state.engine_client = vllm
    await server.call("GET", "/health")  # before stages are told, since costs are measured then
    server.middleware._stages.watch(server.app.state)
    return await server.chat(ask(sized(96, 96), stream=True))


async def test_a_stream_whose_first_output_is_a_failure_is_an_error_that_is_explained() -> None:
    answer = await stream_of("error")
    assert answer.status == 503
    assert answer.json["error"]["type"] == "embedding_unavailable_error"


async def test_other_streams_pass_untouched() -> None:
    for reasons, body in (((None, "error"), (ROLE, TOKEN, FAILURE, END)), ((None, "stop"), (ROLE, TOKEN, TOKEN, END))):
        answer = await stream_of(*reasons)
        assert (answer.status, answer.body) == (200, b"".join(body))


async def test_the_error_of_an_engine_that_has_died_is_vllms_own() -> None:
    server = Server(VLLM(config(), status=500))
    server.app.state.engine_client.errored = True
    answer = await server.chat(ask(sized(96, 96)))
    assert (answer.status, answer.body) == (500, b"answered")


async def test_a_body_in_pieces_arrives_whole() -> None:
    body = ask("x" * 1000)
    vllm = VLLM(config())
    await Server(vllm).chat(body[:10], body[10:500], body[500:])
    assert vllm.bodies == [body]


@pytest.mark.parametrize(
    "content",
    [
        "what is <|image_pad|>?",
        [{"type": "text", "text": "what is <|image_pad|>?"}],
        [{"type": "text", "text": "what is <|image_"}, {"type": "text", "text": "pad|>?"}],
    ],
    ids=["string", "part", "halves"],
)
@pytest.mark.parametrize("escaped", [False, True])
async def test_a_text_does_not_name_the_place_of_an_image(content: Any, escaped: bool) -> None:
    vllm = VLLM(config())
    url = {"type": "image_url", "image_url": {"url": "http://host/<|image_pad|>.png"}}
    messages = [{"role": "user", "content": content}, {"role": "user", "content": [url]}]
    body = json.dumps({"messages": messages, "seed": 1}).encode()
    if escaped:
        body = body.replace(b"what is <", b"what is \\u003c")
    await Server(vllm).chat(body)
    sent = json.loads(vllm.bodies[0])
    text = sent["messages"][0]["content"]
    text = text if isinstance(text, str) else "".join(part["text"] for part in text)
    assert "<|image_pad|>" not in text
    assert text.replace("\u2060", "") == "what is <|image_pad|>?"
    assert sent["messages"][1]["content"] == [url]
    assert vllm.lengths == [str(len(vllm.bodies[0]))]


async def test_other_special_words_and_angles_pass_byte_for_byte() -> None:
    vllm = VLLM(config())
    body = b'{"messages": [ {"role":"user","content":"a < b <|im_end|> \\u003cimage>"}], "seed":1.50e0}'
    await Server(vllm).chat(body)
    assert vllm.bodies == [body]


@pytest.mark.parametrize("declared", [True, False])
async def test_a_body_past_the_limit_is_refused(declared: bool) -> None:
    vllm = VLLM(config())
    server = Server(vllm, max_body_bytes=100)
    answer = await server.call("POST", CHAT_PATH, b"x" * 60, b"x" * 60, length=120 if declared else None)
    assert answer.status == 413
    assert answer.json["error"]["type"] == "invalid_request_error"
    assert vllm.bodies == []
    assert (await server.chat(b"x" * 100)).body == b"answered"


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        (CHAT_PATH, ask("x" * 5000), 413, "besides images in base64, and the limit is 4500 bytes"),
        (CHAT_PATH, ask("data:" + "x" * 5000), 413, "besides images in base64"),
        (CHAT_PATH, b'{"messages":[%b]}' % b",".join([b"{}"] * 1025), 400, "1025 messages and 1024 is the limit"),
        (CHAT_PATH, b'{"messages":[{"content":[%b]}]}' % b",".join([b"1"] * 1800), 200, ""),
        (COMPLETIONS_PATH, json.dumps({"prompt": ["x"] * 65}).encode(), 400, "65 prompts and 64 is the limit"),
        (COMPLETIONS_PATH, json.dumps({"prompt": [7] * 65}).encode(), 200, ""),
        (COMPLETIONS_PATH, json.dumps({"prompt": "x" * 5000}).encode(), 413, "besides images in base64"),
    ],
)
async def test_a_body_has_the_limits_of_chiasms_own_instances(path: str, body: bytes, status: int, said: str) -> None:
    vllm = VLLM(config())
    answer = await Server(vllm, max_text_bytes=4500).call("POST", path, body, length=len(body))
    assert answer.status == status
    assert vllm.bodies == ([body] if status == 200 else [])
    assert said in answer.body.decode()


async def test_a_body_that_would_become_too_many_objects_is_refused_and_counted() -> None:
    refused = middleware._refusals().count(Limit.JSON_MEMBERS)
    answer = await Server(VLLM(config())).chat(b"[" * 100_000)
    assert (answer.status, answer.json["error"]["code"]) == (400, Code.INVALID_JSON)
    assert middleware._refusals().count(Limit.JSON_MEMBERS) == refused + 1


async def test_images_in_base64_do_not_count_as_text() -> None:
    vllm = VLLM(config())
    parts: list[object] = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{letter * 8000}"}} for letter in "AB"
    ]
    body = ask(*parts, sized(96, 96))
    assert (await Server(vllm, max_text_bytes=2000).chat(body)).status == 200
    (got,) = map(json.loads, vllm.bodies)
    assert got["messages"][0]["content"][:2] == json.loads(body)["messages"][0]["content"][:2]


async def test_the_rest_of_a_refused_body_is_read_before_the_answer() -> None:
    server = Server(VLLM(config()), max_body_bytes=100)
    answer = await server.call("POST", CHAT_PATH, *[b"x" * 60] * 5, length=300)
    assert answer.status == 413
    assert server.left == []


async def test_a_client_that_leaves_before_its_body_is_whole_is_forgotten() -> None:
    vllm = VLLM(config())
    assert (await Server(vllm).call("POST", CHAT_PATH, length=10)).status == 0
    assert vllm.bodies == []


async def test_other_paths_and_methods_pass_untouched() -> None:
    vllm = VLLM(config())
    server = Server(vllm, max_body_bytes=10)
    body = ask(sized(96, 96))
    assert (await server.call("POST", "/v1/embeddings", body)).body == b"answered"
    assert (await server.call("POST", "/health", body)).headers == {b"x-from": b"vllm"}
    assert (await server.call("GET", CHAT_PATH)).body == b"answered"
    assert vllm.bodies == [body, body, b""]


LOAD = Load(outstanding_seconds=1000.0, kv_blocks_free=9)


class Core:
    """vLLM's client of its engines."""

    def __init__(self, *exchanges: Exchange) -> None:
        self.told: list[EmbeddingPlaces] = []
        self.missing = [["a" * 64], ["b" * 64, "a" * 64, "c" * 64]]
        """What requests of each engine need next; ``c`` is on its way."""
        self._exchanges = exchanges

    async def call_utility_all_async(self, method: str, *arguments: str) -> list[Any]:
        if method == EXPECT_METHOD:
            self.told.append(msgspec.json.decode(*arguments, type=EmbeddingPlaces))
            return [None, None]
        if method == PLACE_METHOD:
            return [msgspec.json.encode(exchange).decode() for exchange in self._exchanges]
        if method == MISSING_METHOD:
            return list(self.missing)
        if method == LOAD_METHOD:
            return [msgspec.json.encode(LOAD).decode()]
        assert method == AWAITED_METHOD
        return [["a" * 64], ["b" * 64, "a" * 64]]


def served(role: str, core: Core, connector: str = "TcpConnector") -> Server:
    """Return a server whose embeddings go from memory to memory."""
    one = config(role)
    one.ec_transfer_config.ec_connector_extra_config = {"connector": connector}
    server = Server(VLLM(one))
    server.app.state.engine_client = SimpleNamespace(engine_core=core, errored=False)
    return server


PLACE = ECPlace(host="10.0.0.1", port=7000, engine_id="e" * 32)


async def test_an_encoder_says_where_its_embeddings_are() -> None:
    server = served("ec_producer", Core(Exchange("", PLACE)))
    health = msgspec.json.decode((await server.call("GET", "/health")).body, type=Health)
    assert (health.ec_connector, health.ec_place, health.ec_store) == ("TcpConnector", PLACE, "")


async def test_health_tells_the_load_of_the_engines() -> None:
    health = msgspec.json.decode(
        (await served("ec_consumer", Core(Exchange())).call("GET", "/health")).body, type=Health
    )
    assert health.load is not None
    assert LOAD.outstanding_seconds - 100 < health.load.outstanding_seconds <= LOAD.outstanding_seconds
    assert (health.load.kv_blocks_free, health.load.requests) == (LOAD.kv_blocks_free, 0)


async def test_an_encoder_whose_engines_are_in_different_places_is_refused() -> None:
    other = ECPlace(host="10.0.0.1", port=7001, engine_id="f" * 32)
    server = served("ec_producer", Core(Exchange("", PLACE), Exchange("", other)))
    answer = await server.call("GET", "/health")
    assert answer.status == 503
    assert "--data-parallel-size" in answer.json["message"]


async def test_all_engines_are_told_where_embeddings_are() -> None:
    core = Core(Exchange())
    server = served("ec_consumer", core)
    told = EmbeddingPlaces(places={NAME: PLACE}, stored=["cd" * 32])
    answer = await server.call("POST", PLACES_PATH, msgspec.json.encode(told))
    assert (answer.status, core.told) == (204, [told])


async def test_an_image_whose_embedding_can_never_be_received_is_refused() -> None:
    rows, hidden = len(load_processor(CHECKPOINT).geometry_of_size(96, 96).rows), 64
    server = served("ec_consumer", Core(Exchange(max_received_bytes=rows * hidden * 4)))
    model = server.app.state.vllm_config.model_config
    model.hf_config, model.get_inputs_embeds_size = SimpleNamespace(), lambda: hidden
    assert (await server.chat(ask(sized(96, 96)))).status == 200
    answer = await server.chat(ask(sized(96, 192)))
    assert (answer.status, answer.json["error"]["code"]) == (400, Code.EMBEDDING_TOO_LARGE)
    assert "--ec-receive-bytes" in answer.json["error"]["message"]


async def test_places_that_cannot_be_read_are_refused() -> None:
    core = Core(Exchange())
    server = served("ec_consumer", core)
    for body in (b"{", b'{"places": {"../../a": {}}}', json.dumps({"places": {NAME: {"host": "a"}}}).encode()):
        assert (await server.call("POST", PLACES_PATH, body)).status == 400
    assert core.told == []


async def test_a_stranger_cannot_say_where_embeddings_are() -> None:
    core = Core(Exchange())
    answer = await served("ec_consumer", core).call("POST", PLACES_PATH, b"{}", peer="192.0.2.1")
    assert answer.json["error"]["code"] == Code.FLEET_KEY_NEEDED
    assert core.told == []


async def test_the_embeddings_that_any_engine_waits_for_are_named(store: Path) -> None:
    server = Server(VLLM(config("ec_consumer", store=store)))
    server.app.state.engine_client = SimpleNamespace(engine_core=Core(), errored=False)
    answer = await server.call("GET", AWAITED_PATH)
    assert (answer.status, answer.json) == (200, {"identifiers": ["a" * 64, "b" * 64]})


async def test_what_came_while_the_connector_was_asked_is_not_awaited(store: Path) -> None:
    """It is in memory now, and no longer on its way."""
    server, core = Server(VLLM(config("ec_consumer", store=store))), Core()
    server.app.state.engine_client = SimpleNamespace(engine_core=core, errored=False)
    core.missing = [["a" * 64], ["a" * 64]]
    assert (await server.call("GET", AWAITED_PATH)).json == {"identifiers": ["a" * 64]}


class Telling(Core):
    """One engine, at which questions wait until they are answered."""

    def __init__(self) -> None:
        super().__init__(Exchange())
        self.losses = LossWatch(lambda names: [name for name in names if name == "b" * 64])
        self.questions: asyncio.Queue[list[str]] = asyncio.Queue()

    async def call_utility_all_async(self, method: str, *arguments: str) -> list[Any]:
        if method != LOST_METHOD:
            return await super().call_utility_all_async(method, *arguments)
        asker, published = arguments
        names = json.loads(published)
        told = self.losses.ask(asker, names)
        self.questions.put_nowait(names)
        return [await asyncio.wrap_future(told)]


def question(*published: str, seconds: float = 60) -> bytes:
    return json.dumps({"asker": "proxy", "published": published, "seconds": seconds}).encode()


async def test_a_question_waits_at_the_engine_until_an_embedding_is_lost() -> None:
    core = Telling()
    server = served("ec_consumer", core)
    asking = asyncio.create_task(server.call("POST", LOST_PATH, question("a" * 64, "b" * 64), leaves=False))
    assert await core.questions.get() == ["a" * 64, "b" * 64]
    core.losses.note_missing(["b" * 64])
    assert (await asking).json == {"identifiers": ["b" * 64]}


async def test_a_question_whose_time_is_over_ends_at_the_engine() -> None:
    core = Telling()
    answer = await served("ec_consumer", core).call("POST", LOST_PATH, question("a" * 64, seconds=0.01), leaves=False)
    assert answer.json == {"identifiers": []}
    assert not core.losses.is_asked


async def test_a_question_whose_client_leaves_ends_at_the_engine() -> None:
    core = Telling()
    await served("ec_consumer", core).call("POST", LOST_PATH, question("a" * 64))
    assert not core.losses.is_asked
    # Which it may have reached before it was ended, or not at all.
    assert core.questions.empty() or core.questions.get_nowait() == ["a" * 64]


async def test_a_question_ends_when_the_server_is_asked_to_end() -> None:
    core = Telling()
    server = served("ec_consumer", core)
    asking = asyncio.create_task(server.call("POST", LOST_PATH, question("a" * 64), leaves=False))
    await core.questions.get()
    server.middleware._end.asked.set()
    assert (await asking).json == {"identifiers": []}
    assert not core.losses.is_asked


async def test_a_question_ends_when_the_same_proxy_asks_again() -> None:
    core = Telling()
    server = served("ec_consumer", core)
    asking = asyncio.create_task(server.call("POST", LOST_PATH, question("a" * 64), leaves=False))
    await core.questions.get()
    assert (await server.call("POST", LOST_PATH, question(), leaves=False)).json == {"identifiers": []}
    assert (await asking).json == {"identifiers": []}


async def test_a_question_that_cannot_be_read_is_refused() -> None:
    core = Telling()
    server = served("ec_consumer", core)
    for body in (b"{", question("../../a"), question(seconds=1000)):
        assert (await server.call("POST", LOST_PATH, body)).status == 400
    answer = await server.call("POST", LOST_PATH, question(), peer="192.0.2.1")
    assert answer.json["error"]["code"] == Code.FLEET_KEY_NEEDED
    assert core.questions.empty()


async def test_of_several_engines_no_question_waits() -> None:
    server = served("ec_consumer", Telling())
    server.app.state.vllm_config.parallel_config.data_parallel_size = 2
    assert "tells_lost" not in (await server.call("GET", "/health")).json


class Dying(Core):
    """An engine that dies before it has answered, which vLLM notices and doesn't tell who asked."""

    async def call_utility_all_async(self, method: str, *arguments: str) -> list[Any]:
        if method not in (EXPECT_METHOD, LOST_METHOD):
            return await super().call_utility_all_async(method, *arguments)
        await asyncio.Event().wait()
        return []


@pytest.mark.parametrize(
    ("path", "body"), [(PLACES_PATH, b"{}"), (LOST_PATH, question("a" * 64))], ids=["places", "lost"]
)
async def test_what_an_engine_was_asked_when_it_died_fails(path: str, body: bytes) -> None:
    server = served("ec_consumer", Dying(Exchange()))
    client = server.app.state.engine_client
    client.errored, client.dead_error = True, RuntimeError("the engine is dead")
    with pytest.raises(RuntimeError, match="the engine is dead"):
        await asyncio.wait_for(server.call("POST", path, body, leaves=False), 10)


async def test_without_chiasms_connector_the_question_goes_to_vllm() -> None:
    vllm = VLLM(config(), status=404)
    assert (await Server(vllm).call("GET", AWAITED_PATH)).status == 404
    assert vllm.paths == [AWAITED_PATH]


# ---- the fleet key -----------------------------------------------------------------------------------------------------

KEY = FleetKey([make_fleet_key()])
TEXT = {"type": "text", "text": "hello"}
PIXELS = {"type": "image_url", "image_url": {"url": "data:,"}}


def body_of(*parts: Any, **fields: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": list(parts)}]} | fields).encode()


STAGE_CALLS = [
    (CHAT_PATH, body_of(PIXELS | {"uuid": NAME})),
    (CHAT_PATH, body_of(TEXT, {"type": "image_embeds", "image_embeds": None, "uuid": None})),
    (CHAT_PATH, body_of(TEXT, kv_transfer_params={"do_remote_decode": True})),
    (CHAT_PATH, body_of(TEXT, ec_transfer_params={NAME: {}})),
    (CHAT_PATH, body_of(PIXELS | {"uuid": NAME}).replace(b"uuid", b"\\u0075uid")),
    (CHAT_PATH, body_of(TEXT, vllm_xargs={"kv_transfer_params": "x"})),
    (COMPLETIONS_PATH, json.dumps({"prompt": "a", "kv_transfer_params": {"remote_host": "a"}}).encode()),
    ("/v1/responses", json.dumps({"input": "a"}).encode()),
]
CALLS_OF_CLIENTS = [
    (CHAT_PATH, body_of(TEXT, PIXELS, "a bare text", kv_transfer_params=None)),
    (COMPLETIONS_PATH, b'{"prompt": "a", "vllm_xargs": {"mine": 1}}'),
]


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch, store: Path) -> Server:
    """A PD with a fleet key."""
    for name, value in KEY.environment().items():
        monkeypatch.setenv(name, value)
    return Server(VLLM(config("ec_consumer", store=store)))


@pytest.mark.parametrize(("path", "body"), STAGE_CALLS)
async def test_only_the_fleet_does_what_only_the_fleet_may(fleet: Server, path: str, body: bytes) -> None:
    assert (await fleet.call("POST", path, body)).json["error"]["code"] == Code.FLEET_KEY_NEEDED
    signed = signature(KEY, "POST", path, body_digest(body))
    wrong = signature(FleetKey([make_fleet_key()]), "POST", path, body_digest(body))
    assert (await fleet.call("POST", path, body, signed=wrong)).json["error"]["code"] == Code.FLEET_SIGNATURE_INVALID
    answer = await fleet.call("POST", path, body, signed=signed)
    assert answer.status == 200 or answer.json["error"]["code"] == Code.INVALID_UUID


@pytest.mark.parametrize(("path", "body"), STAGE_CALLS)
async def test_without_a_key_that_is_this_machine(path: str, body: bytes) -> None:
    server = Server(VLLM(config()))
    refused = await server.call("POST", path, body, peer="192.0.2.1")
    assert refused.json["error"]["code"] == Code.FLEET_KEY_NEEDED
    assert (await server.call("POST", path, body, peer="127.0.0.1")).status == 200


@pytest.mark.parametrize(("path", "body"), CALLS_OF_CLIENTS)
async def test_anybody_may_ask_what_a_client_asks(fleet: Server, path: str, body: bytes) -> None:
    assert (await fleet.call("POST", path, body, peer="192.0.2.1")).status == 200
    assert (await fleet.call("GET", "/v1/models", peer="192.0.2.1")).status == 200


async def test_what_only_vllm_would_understand_is_refused_to_strangers(fleet: Server) -> None:
    body = body_of(PIXELS | {"uuid": NAME}, temperature=float("nan"))
    assert (await fleet.call("POST", CHAT_PATH, body)).json["error"]["code"] == Code.INVALID_JSON


async def test_health_tells_the_name_of_the_key_and_the_clock(fleet: Server) -> None:
    health = msgspec.json.decode((await fleet.call("GET", "/health")).body, type=Health)
    assert health.fleet_keys == list(KEY.names)
    assert health.clock_milliseconds
