"""Versions mix while a fleet is updated: what an older version sends is read, and what is sent now an older version reads.

The literals are messages of version 0.3, and the ``Old…`` types are what it read them with. Neither may be changed; a message
that can't be read as its literal breaks updates of running fleets.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest
from msgspec import Raw

from chiasm.errors import Code, OverloadedError
from chiasm.http import events
from chiasm.http.errors import error_body
from chiasm.wire import (
    AWAITED_PATH,
    CHAT_PATH,
    COMPLETIONS_PATH,
    KV_COMMENT,
    LOST_PATH,
    MAX_PLACES,
    PLACES_PATH,
    TIMING_COMMENT,
    TOKENS_COMMENT,
    ECItem,
    ECPlace,
    EmbeddingPlaces,
    ErrorBody,
    ErrorDetail,
    Health,
    InstanceInfo,
    InstanceList,
    KVTransferParams,
    ProxyHealth,
    TokenLogprob,
)

A = "a" * 64

# ---- messages of version 0.3 -------------------------------------------------------------------------------------------

PD_HEALTH = (
    b'{"status":"ok","role":"pd","model":"qwen","fingerprint":"f1f1","dtype":"bfloat16","version":"0.3.0",'
    b'"max_model_len":32768,"max_items":16,"device":"cuda:0","threads":8,"cpus":[0,1],"ec_store":"s1"}'
)
DECODE_HEALTH = (
    b'{"status":"ok","role":"decode","model":"qwen","fingerprint":"f1f1","dtype":"float32","version":"0.3.0",'
    b'"max_model_len":512,"max_items":16,"device":"cpu","threads":1,"cpus":[3],"ec_store":"",'
    b'"kv_connector":"SharedMemoryConnector","kv_blocks_total":8,"kv_blocks_free":5,"max_num_seqs":64}'
)
VLLM_HEALTH = (
    b'{"status":"ok","role":"aggregated","model":"qwen","fingerprint":"","dtype":"float16","ec_store":"","version":"0.3.0",'
    b'"engine":"vllm 0.32.0","max_model_len":4096,"max_items":null,"max_num_seqs":256,"takes_image_size":false,'
    b'"device":"cuda:0,1","threads":null,"cpus":[0]}'
)
FAILED_HEALTH = (
    b'{"status":"failed","role":"encoder","model":"qwen","fingerprint":"f1f1","dtype":"float32","version":"0.3.0",'
    b'"max_model_len":512,"max_items":16,"device":"cpu","threads":1,"cpus":[3],"ec_store":"","message":"cannot read it"}'
)
STARTING_HEALTH = b'{"status":"starting"}'
PROXY_HEALTH = (
    b'{"status":"ok","models":["qwen"],"instances":[{"url":"http://127.0.0.1:8001","role":"encoder","state":"healthy",'
    b'"reason":null,"model":"qwen","version":"0.3.0","engine":null,"outstanding_work":0.0,"in_flight":0},'
    b'{"url":"http://127.0.0.1:8002","role":"pd","state":"unhealthy","reason":"unreachable","model":null,"version":null,'
    b'"engine":"vllm 0.32.0","outstanding_work":12.5,"in_flight":2}]}'
)
ENCODER_RESPONSE = (
    b'{"id":"chatcmpl-1","created":1700000000,"model":"qwen","choices":[{"index":0,"message":{"content":"",'
    b'"role":"assistant"},"finish_reason":"stop","logprobs":null,"stop_reason":null}],"usage":{"prompt_tokens":0,'
    b'"completion_tokens":0,"total_tokens":0,"prompt_tokens_details":{"cached_tokens":0}},"object":"chat.completion",'
    b'"ec_transfer_params":{"' + A.encode() + b'":{"item_indices":[0,2],"metadata":{"image_grid_thw":[1,32,32]}}}}'
)
TO_PREFILL = b'{"do_remote_decode":true,"continues":true}'
TO_PREFILL_AS_VLLM = (
    b'{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,"remote_block_ids":null,'
    b'"remote_host":null,"remote_port":null}'
)
HANDLE = (
    b'{"do_remote_prefill":true,"remote_engine_id":"e1","remote_block_ids":[4,7],"remote_host":"p.example",'
    b'"remote_port":7001,"remote_request_id":"r-1-0","continues":true,"num_tokens":20,"digest":"d1","output_token_ids":[5],'
    b'"output_logprobs":[[-0.5,[[5,-0.5],[9,-1.5]]]],"num_sent":1,"seed":42,"created":1700000000,"cached_tokens":16}'
)
HANDLE_OF_PROMPTS = (
    b'{"prompts":[{"do_remote_prefill":true,"remote_port":1},{"do_remote_prefill":true,"remote_port":2}]}'
)
ERROR = b'{"error":{"message":"This instance is stopping.","type":"overloaded_error","param":null,"code":"stopping"}}'
VLLM_ERROR = b'{"error":{"message":"too long","type":"BadRequestError","param":"messages","code":400}}'

MESSAGES: list[tuple[bytes, object]] = [
    (
        PD_HEALTH,
        Health(
            status="ok",
            role="pd",
            model="qwen",
            fingerprint="f1f1",
            dtype="bfloat16",
            version="0.3.0",
            max_model_len=32768,
            max_items=16,
            device="cuda:0",
            threads=8,
            cpus=[0, 1],
            ec_store="s1",
        ),
    ),
    (
        DECODE_HEALTH,
        Health(
            role="decode",
            model="qwen",
            fingerprint="f1f1",
            dtype="float32",
            version="0.3.0",
            max_model_len=512,
            max_items=16,
            device="cpu",
            threads=1,
            cpus=[3],
            kv_connector="SharedMemoryConnector",
            kv_blocks_total=8,
            kv_blocks_free=5,
            max_num_seqs=64,
        ),
    ),
    (
        VLLM_HEALTH,
        Health(
            role="aggregated",
            model="qwen",
            dtype="float16",
            version="0.3.0",
            engine="vllm 0.32.0",
            max_model_len=4096,
            max_num_seqs=256,
            takes_image_size=False,
            device="cuda:0,1",
            cpus=[0],
        ),
    ),
    (
        FAILED_HEALTH,
        Health(
            status="failed",
            message="cannot read it",
            role="encoder",
            model="qwen",
            fingerprint="f1f1",
            dtype="float32",
            version="0.3.0",
            max_model_len=512,
            max_items=16,
            device="cpu",
            threads=1,
            cpus=[3],
        ),
    ),
    (STARTING_HEALTH, Health(status="starting")),
    (
        PROXY_HEALTH,
        ProxyHealth(
            status="ok",
            models=["qwen"],
            instances=[
                InstanceInfo(
                    url="http://127.0.0.1:8001", role="encoder", state="healthy", model="qwen", version="0.3.0"
                ),
                InstanceInfo(
                    url="http://127.0.0.1:8002",
                    role="pd",
                    state="unhealthy",
                    reason="unreachable",
                    engine="vllm 0.32.0",
                    outstanding_work=12.5,
                    in_flight=2,
                ),
            ],
        ),
    ),
    (TO_PREFILL, KVTransferParams(do_remote_decode=True, continues=True)),
    (TO_PREFILL_AS_VLLM, KVTransferParams(do_remote_decode=True)),
    (
        HANDLE,
        KVTransferParams(
            do_remote_prefill=True,
            remote_engine_id="e1",
            remote_block_ids=[4, 7],
            remote_host="p.example",
            remote_port=7001,
            remote_request_id="r-1-0",
            continues=True,
            num_tokens=20,
            digest="d1",
            output_token_ids=[5],
            output_logprobs=[TokenLogprob(-0.5, ((5, -0.5), (9, -1.5)))],
            num_sent=1,
            seed=42,
            created=1700000000,
            cached_tokens=16,
        ),
    ),
    (
        HANDLE_OF_PROMPTS,
        KVTransferParams(prompts=[KVTransferParams(do_remote_prefill=True, remote_port=port) for port in (1, 2)]),
    ),
    (
        ERROR,
        ErrorBody(error=ErrorDetail(message="This instance is stopping.", type="overloaded_error", code="stopping")),
    ),
    (
        VLLM_ERROR,
        ErrorBody(error=ErrorDetail(message="too long", type="BadRequestError", param="messages", code=400)),
    ),
]


class EncoderResponse(msgspec.Struct):
    """The part of an encoder's response that the proxy reads."""

    ec_transfer_params: dict[str, ECItem]


# ---- what version 0.3 read messages with -------------------------------------------------------------------------------


class OldHealth(msgspec.Struct):
    """The proxy's, of a response with status 200."""

    role: str
    model: str
    status: str = "ok"
    fingerprint: str = ""
    ec_store: str = ""
    version: str = ""
    engine: str = ""
    dtype: str = ""
    takes_image_size: bool = True
    max_model_len: int | None = None
    max_items: int | None = None
    kv_connector: str | None = None
    kv_blocks_total: int | None = None
    kv_blocks_free: int | None = None
    max_num_seqs: int | None = None


class OldTrouble(msgspec.Struct):
    """The proxy's, of a /health response with another status."""

    status: str = ""
    message: str = ""


class OldItem(msgspec.Struct):
    metadata: Raw = Raw(b"{}")


class OldEncoderResponse(msgspec.Struct):
    ec_transfer_params: dict[str, OldItem] | None = None


class OldTokenLogprob(msgspec.Struct, array_like=True, frozen=True):
    logprob: float
    top: list[tuple[int, float]]


class OldErrorDetail(msgspec.Struct):
    message: str = ""
    type: str = ""
    param: str | None = None
    code: str | int | None = None


class OldErrorBody(msgspec.Struct):
    error: OldErrorDetail


OLD_TOKENS = re.compile(rb": tokens((?: [0-9]{1,10})*) ?\r?\n")
OLD_HANDLE = re.compile(rb": kv_transfer_params (\{.*)\r?\n")


# ---- new reads old -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("message", "expected"), MESSAGES)
def test_an_old_message_is_read(message: bytes, expected: object) -> None:
    assert msgspec.json.decode(message, type=type(expected)) == expected


@pytest.mark.parametrize(("message", "expected"), MESSAGES)
def test_fields_of_later_versions_are_ignored(message: bytes, expected: object) -> None:
    message = message.replace(b"{", b'{"of_a_later_version":{"x":[1]},')
    assert msgspec.json.decode(message, type=type(expected)) == expected


@pytest.mark.parametrize(
    "kind",
    [
        Health,
        InstanceInfo,
        InstanceList,
        ProxyHealth,
        ECItem,
        ECPlace,
        EmbeddingPlaces,
        KVTransferParams,
        ErrorBody,
    ],
)
def test_no_field_is_required(kind: type[Any]) -> None:
    assert msgspec.json.decode(b"{}", type=kind) == kind()


def test_an_old_list_of_instances_is_read() -> None:
    listed = msgspec.json.decode(PROXY_HEALTH, type=InstanceList)
    assert [instance.state for instance in listed.instances] == ["healthy", "unhealthy"]


def test_an_old_encoders_response_is_read() -> None:
    for message in (ENCODER_RESPONSE, ENCODER_RESPONSE.replace(b'{"item_indices"', b'{"new":1,"item_indices"')):
        response = msgspec.json.decode(message, type=EncoderResponse)
        assert response.ec_transfer_params[A].item_indices == [0, 2]
        assert bytes(response.ec_transfer_params[A].metadata) == b'{"image_grid_thw":[1,32,32]}'


@pytest.mark.parametrize(
    "message",
    [
        b'{"remote_block_ids":[-1]}',
        b'{"remote_block_ids":[2147483648]}',
        b'{"remote_port":65536}',
        b'{"digest":"' + b"d" * 257 + b'"}',
        b'{"num_tokens":-1}',
        b'{"output_logprobs":[[null,[]]]}',
        b'{"prompts":' + str([{}] * 1025).encode() + b"}",
    ],
    ids=lambda message: message[:30].decode(),
)
def test_a_handle_out_of_bounds_is_refused(message: bytes) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(message, type=KVTransferParams)


@pytest.mark.parametrize(
    "message",
    [
        b'{"stored":["' + A[1:].encode() + b'"]}',
        b'{"stored":["' + A[1:].encode() + b'\\n"]}',
        b'{"stored":["' + A.upper().encode() + b'"]}',
        b'{"stored":' + str([A] * (MAX_PLACES + 1)).replace("'", '"').encode() + b"}",
        b'{"places":{"../' + A[3:].encode() + b'":{}}}',
        b'{"places":{"' + A.encode() + b'":{"port":65536}}}',
        b'{"places":{"' + A.encode() + b'":{"host":"' + b"h" * 257 + b'"}}}',
        b'{"places":{"' + A.encode() + b'":null}}',
        msgspec.json.encode({"places": {f"{number:064x}": {} for number in range(MAX_PLACES + 1)}}),
    ],
    ids=lambda message: message[:30].decode(),
)
def test_places_out_of_bounds_are_refused(message: bytes) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(message, type=EmbeddingPlaces)


# ---- old reads new -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("message", [PD_HEALTH, DECODE_HEALTH, VLLM_HEALTH])
def test_an_old_proxy_reads_health(message: bytes) -> None:
    sent = msgspec.json.encode(msgspec.json.decode(message, type=Health))
    assert msgspec.json.decode(sent, type=OldHealth) == msgspec.json.decode(message, type=OldHealth)


@pytest.mark.parametrize("message", [STARTING_HEALTH, FAILED_HEALTH])
def test_an_old_proxy_reads_why_an_instance_is_not_healthy(message: bytes) -> None:
    sent = msgspec.json.encode(msgspec.json.decode(message, type=Health))
    assert msgspec.json.decode(sent, type=OldTrouble) == msgspec.json.decode(message, type=OldTrouble)


def test_health_always_has_its_status() -> None:
    assert msgspec.json.encode(Health()) == b'{"status":"ok"}'
    assert msgspec.json.encode(Health(status="starting")) == STARTING_HEALTH


def test_an_old_command_reads_the_proxys_health() -> None:
    sent = msgspec.json.encode(msgspec.json.decode(PROXY_HEALTH, type=ProxyHealth))
    assert msgspec.json.decode(sent) == msgspec.json.decode(PROXY_HEALTH)


def test_an_old_proxy_reads_an_encoders_response() -> None:
    item = ECItem(item_indices=[0, 2], metadata=Raw(b'{"image_grid_thw":[1,32,32]}'))
    sent = msgspec.json.encode(EncoderResponse({A: item}))
    assert msgspec.json.decode(sent) == {
        "ec_transfer_params": msgspec.json.decode(ENCODER_RESPONSE)["ec_transfer_params"]
    }
    read = msgspec.json.decode(sent, type=OldEncoderResponse).ec_transfer_params
    assert read is not None
    assert bytes(read[A].metadata) == b'{"image_grid_thw":[1,32,32]}'


@pytest.mark.parametrize("message", [TO_PREFILL, HANDLE, HANDLE_OF_PROMPTS])
def test_handles_are_written_as_ever_but_for_token_ids_at_the_end_of_log_probabilities(message: bytes) -> None:
    sent = msgspec.json.encode(msgspec.json.decode(message, type=KVTransferParams))
    assert sent == message.replace(b"[9,-1.5]]]", b"[9,-1.5]],-1]")


def test_an_old_instance_reads_log_probabilities() -> None:
    sent = msgspec.json.encode(TokenLogprob(-0.5, ((5, -0.5),), 5))
    assert msgspec.json.decode(sent, type=OldTokenLogprob) == OldTokenLogprob(-0.5, [(5, -0.5)])


def test_an_old_proxy_reads_errors() -> None:
    sent = error_body(OverloadedError("This instance is stopping.", code=Code.STOPPING))
    assert sent == ERROR.removesuffix(b"}") + b',"type":"error"}'
    assert msgspec.json.decode(sent, type=OldErrorBody).error.code == "stopping"


def test_an_old_proxy_reads_the_comments_of_a_stream() -> None:
    line = events.comment_line(TOKENS_COMMENT, "5 9")
    assert (line, events.comment(TOKENS_COMMENT, "5 9")) == (b": tokens 5 9\n", b": tokens 5 9\n\n")
    assert OLD_TOKENS.fullmatch(line)
    handle = OLD_HANDLE.match(events.comment(KV_COMMENT, HANDLE.decode()))
    assert handle is not None
    assert handle[1] == HANDLE
    assert events.comment(TIMING_COMMENT, "total;dur=1.000") == b": server-timing total;dur=1.000\n\n"


@pytest.mark.parametrize("code", ["kv_unavailable", "preempted", "stopping", "failed", "starting"])
def test_codes_that_proxies_act_on_keep_their_spelling(code: str) -> None:
    assert code in list(Code)


def test_paths_keep_their_spelling() -> None:
    assert (CHAT_PATH, COMPLETIONS_PATH) == ("/v1/chat/completions", "/v1/completions")
    assert (AWAITED_PATH, LOST_PATH, PLACES_PATH) == (
        "/embeddings/awaited",
        "/embeddings/lost",
        "/embeddings/places",
    )
