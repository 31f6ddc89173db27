"""Encoder, prefill and decode apart, on vLLM and on chiasm, behind chiasm's proxy.

Every response is the same as that of a single vLLM instance. Each checkpoint has another connector. One has a decode instance
that is short of KV blocks, and one has a shared cache. The last tests end instances.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from chiasm.bench import synthetic
from chiasm.bench.checkpoints import HEADS_OF_64
from chiasm.ec_transfer.stores.address import URL_VARIABLE
from chiasm.http.timing import read_timing
from chiasm.integrations.vllm.outputs import WAITS
from chiasm.media import identifier
from chiasm.proxy.handover_engines import vllm_prefill_body
from tests.store_server import StoreServer, running

from .fleet import WAIT_SECONDS, Answer, ask, ask_all, bodies, front, images, prefill_and_decode, record_of, spans_of
from .processes import CALL_SECONDS, CHECKPOINT, CLIENT, Server, chiasm_instance, transfer_config, vllm
from .test_doctor import examine
from .wire import Body, chat, image_bytes, image_part

HANDOVERS = "chiasm_proxy_handovers_total"
UNFETCHED = "Others may not have fetched"
"""What an instance logs that has drained without knowing that nobody needs anything from it."""
EXIT_SECONDS = 300


@dataclass
class Fleet:
    """Instances with the same checkpoint, and a proxy for each way to split the work."""

    encoder: Server
    pd: Server
    prefill: Server
    decode: Server
    encoder_of_chiasm: Server
    split: Server
    """One encoder and one PD."""
    split_twice: Server
    """One encoder, one prefill and one decode instance."""
    chiasms_encoder: Server
    """chiasm's encoder and vLLM's PD."""
    chiasms_pd: Server
    """vLLM's encoder and chiasm's PD."""
    aggregated: Server
    bodies: list[Body]
    expected: list[Answer]
    """The responses of ``aggregated`` to ``bodies``."""
    shared_cache: StoreServer | None


_CONNECTORS = {"qwen2_5_vl": "SharedMemoryConnector", "qwen3_vl": "TcpConnector"}
"""That of the demo checkpoint is SharedStorageConnector."""
SHORT_OF_KV = "qwen2_5_vl"
"""The checkpoint whose decode instance has few KV blocks."""
WITH_SHARED_CACHE = "qwen3_vl"
"""The checkpoint whose encoder writes to a shared cache and whose PD and prefill instances read from it."""
_FEW_BLOCKS = ("--num-gpu-blocks-override", "17", "--no-enable-prefix-caching")
"""Of 128 tokens: enough for one request of any length, and not for three of 900. What is computed again is computed whole."""


@pytest.fixture(scope="module", params=["demo", "qwen2_5_vl", "qwen3_vl"])
def fleet(request: pytest.FixtureRequest, logs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    name: str = request.param
    with ExitStack() as stack:

        def keep(server: Server) -> Server:
            stack.callback(server.stop)
            return server

        shared_cache = None
        if name == "demo":
            checkpoint: Path = CHECKPOINT
            through: Path | str = request.getfixturevalue("store")
            shared = request.getfixturevalue("shared_instances").get("encoder", "pd", "aggregated", "prefill_decode")
            encoder, pd, aggregated, prefill, decode = shared
            started: list[Server] = []
        else:
            checkpoint = synthetic.make(name, tmp_path_factory.mktemp("checkpoint") / name, size=HEADS_OF_64)
            through = _CONNECTORS[name]
            consumer = transfer_config("ec_consumer", through, wait_seconds=WAIT_SECONDS)
            if name == WITH_SHARED_CACHE:
                shared_cache = stack.enter_context(running())
            environment = {URL_VARIABLE: shared_cache.url if shared_cache else ""}
            started = [
                keep(vllm(logs, f"{name}-{role}", transfer, environment=environment, checkpoint=checkpoint))
                for role, transfer in (
                    ("encoder", transfer_config("ec_producer", through)),
                    ("pd", consumer),
                    ("aggregated", None),
                )
            ]
            encoder, pd, aggregated = started
            decode_flags = _FEW_BLOCKS if name == SHORT_OF_KV else ()
            apart = prefill_and_decode(
                logs, name, through, checkpoint, decode_flags=decode_flags, environment=environment
            )
            prefill, decode = map(keep, apart)
            started += [prefill, decode]
        own = [keep(chiasm_instance(logs, role, through, checkpoint=checkpoint)) for role in ("encoder", "pd")]
        for server in (*started, *own):
            server.wait_ready()
        some = bodies(1000)
        store_url = shared_cache.url if shared_cache else ""
        fleet = Fleet(
            encoder=encoder,
            pd=pd,
            prefill=prefill,
            decode=decode,
            encoder_of_chiasm=own[0],
            split=keep(front(logs, f"{name}-split", store_url, encoder=[encoder], pd=[pd])),
            split_twice=keep(
                front(
                    logs,
                    f"{name}-twice",
                    store_url,
                    encoder=[encoder],
                    prefill=[prefill],
                    decode=[decode],
                )
            ),
            chiasms_encoder=keep(front(logs, f"{name}-chiasms-encoder", encoder=[own[0]], pd=[pd])),
            chiasms_pd=keep(front(logs, f"{name}-chiasms-pd", encoder=[encoder], pd=[own[1]])),
            aggregated=aggregated,
            bodies=some,
            expected=ask_all(aggregated, some),
            shared_cache=shared_cache,
        )
        for server in (fleet.split, fleet.split_twice, fleet.chiasms_encoder, fleet.chiasms_pd):
            server.wait_ready()
        yield fleet


def test_answers_differ_from_request_to_request(fleet: Fleet) -> None:
    """Otherwise equal responses would prove little."""
    assert len({answer.text for answer in fleet.expected}) > len(fleet.expected) // 2


def test_one_encoder_and_one_pd(fleet: Fleet) -> None:
    assert ask_all(fleet.split, fleet.bodies) == fleet.expected


def test_doctor_proves_that_an_embedding_travels(fleet: Fleet) -> None:
    examined = examine("--encoder", fleet.encoder.url, "--pd", fleet.pd.url)
    assert examined.verdicts("EC store") == ["ok"], examined.findings
    assert examined.verdicts("embedding travels") == ["ok"], examined.findings


def test_one_encoder_one_prefill_and_one_decode(fleet: Fleet) -> None:
    handed_over = fleet.split_twice.metric(HANDOVERS)
    assert ask_all(fleet.split_twice, fleet.bodies) == fleet.expected
    assert fleet.split_twice.metric(HANDOVERS) == handed_over + sum(body["max_tokens"] > 1 for body in fleet.bodies)
    assert fleet.split_twice.metric("chiasm_proxy_prefill_retries_total") == 0
    fleet.decode.until(lambda: fleet.decode.metric("vllm:external_prefix_cache_hits_total") > 0)


def test_chiasms_encoder_and_vllms_pd(fleet: Fleet) -> None:
    some = bodies(1100)  # which vLLM's encoder has not seen
    assert ask_all(fleet.chiasms_encoder, some) == ask_all(fleet.aggregated, some)
    encoder = fleet.encoder_of_chiasm  # counts an image when it is published, which may be after the answer
    encoder.until(lambda: encoder.metric("chiasm_images_encoded_total") == len(images(1100)))


def test_vllms_encoder_and_chiasms_pd(fleet: Fleet) -> None:
    assert ask_all(fleet.chiasms_pd, fleet.bodies) == fleet.expected


@pytest.mark.parametrize("way", ["split", "split_twice"])
def test_streams(fleet: Fleet, way: str) -> None:
    server: Server = getattr(fleet, way)
    assert ask_all(server, fleet.bodies, stream=True) == fleet.expected


@pytest.mark.parametrize("stream", [True, False])
def test_records_have_the_stages_of_language_instances(fleet: Fleet, stream: bool) -> None:
    body = fleet.bodies[2] | {"stream": stream}
    language = {"prepare", "queue", "prefill"}
    spans = spans_of(record_of(fleet.split, body))
    assert spans[fleet.pd.url] >= language | {"decode"}
    apart = spans_of(record_of(fleet.split_twice, body))
    assert apart[fleet.prefill.url] >= language
    assert apart[fleet.decode.url] >= {"prepare", "kv", "prefill", "decode"}
    assert not {"call", "encode call"} & set().union(*spans.values(), *apart.values())


def test_an_encoder_tells_the_stages_of_its_images(fleet: Fleet) -> None:
    response = fleet.encoder.post(chat(*map(image_part, images(1400)[:2]), max_tokens=1))
    assert response.status_code == 200, response.text
    told = {one.name: one for one in read_timing(response.headers["server-timing"])}
    assert told.keys() == {"preprocess0", "encode0", "preprocess1", "encode1", "total"}
    assert all((one.seconds or 0) > 0 for one in told.values())
    assert WAITS not in response.text


def test_a_request_for_several_choices_is_answered_by_prefill_alone(fleet: Fleet) -> None:
    body = fleet.bodies[6] | {"n": 2, "temperature": 1, "top_k": 1}
    response = fleet.split_twice.post(body)
    assert response.status_code == 200, response.text
    texts = [choice["message"]["content"] for choice in response.json()["choices"]]
    assert texts == [fleet.expected[6].text] * 2


@pytest.mark.parametrize("fleet", [SHORT_OF_KV], indirect=True)
def test_decode_that_computes_a_prompt_again_reads_its_images_again(fleet: Fleet) -> None:
    parts = [image_part(image_bytes(seed)) for seed in range(1300, 1304)]
    long = [chat(image, "describe it", max_tokens=900, ignore_eos=True) for image in parts]
    expected = ask_all(fleet.aggregated, long, at_once=len(long))

    def is_preempted() -> bool:
        """Answer all at once. If encoder or prefill hold some up, too few of them may be at the decode instance together."""
        assert ask_all(fleet.split_twice, long, at_once=len(long)) == expected
        return fleet.decode.metric("vllm:num_preemptions_total") > 0

    fleet.decode.until(is_preempted)
    fleet.decode.until(lambda: fleet.decode.count("hits") > 0)
    assert fleet.decode.count("failed_requests") == 0


@pytest.mark.parametrize("fleet", [WITH_SHARED_CACHE], indirect=True)
def test_images_of_an_encoder_that_has_drained_are_answered_from_the_shared_cache(fleet: Fleet) -> None:
    assert fleet.shared_cache is not None
    some = bodies(1200)
    expected = ask_all(fleet.aggregated, some)
    fingerprint = fleet.encoder.health().fingerprint
    names = {identifier(data, fingerprint=fingerprint) for data in images(1200)}
    assert not any(map(fleet.shared_cache.has_entry, names))
    assert ask_all(fleet.split_twice, some) == expected
    fleet.encoder.drain()
    assert fleet.encoder.process.wait(EXIT_SECONDS) == 0
    assert UNFETCHED not in fleet.encoder.text()
    assert all(map(fleet.shared_cache.has_entry, names))
    fleet.split.until(lambda: not _has_healthy_encoder(fleet.split))
    reads = fleet.pd.count("store_reads")
    assert ask_all(fleet.split, some) == expected
    fleet.pd.until(lambda: fleet.pd.count("store_reads") >= reads + len(names))
    assert fleet.pd.count("failed_requests") == 0


@pytest.mark.parametrize("fleet", [WITH_SHARED_CACHE], indirect=True)
def test_a_prefill_instance_that_drains_ends_when_its_kv_is_fetched(fleet: Fleet) -> None:
    body = fleet.bodies[1]
    transfer = _prefilled(fleet, body)
    fleet.prefill.drain()
    fleet.prefill.until(lambda: "setting pause state to PAUSED_NEW" in fleet.prefill.text())
    assert fleet.prefill.post(body).status_code == 503
    assert fleet.prefill.process.poll() is None
    assert ask(fleet.decode, body | transfer) == fleet.expected[1]
    assert fleet.prefill.process.wait(EXIT_SECONDS) == 0
    assert UNFETCHED not in fleet.prefill.text()
    assert "Releasing expired KV blocks" not in fleet.prefill.text()


@pytest.mark.parametrize("fleet", ["demo"], indirect=True)
def test_kv_of_a_prefill_instance_that_died(fleet: Fleet) -> None:
    """The request fails, and the decode instance goes on."""
    body = fleet.bodies[1]
    transfer = _prefilled(fleet, body)
    fleet.prefill.kill()
    lost = fleet.decode.post(body | transfer)
    assert lost.status_code == 500, lost.text
    refused = fleet.split_twice.post(body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_prefill")
    assert fleet.decode.health().status == "ok"
    assert fleet.decode.answer(fleet.bodies[0]) == fleet.expected[0].text


def _has_healthy_encoder(proxy: Server) -> bool:
    instances = CLIENT.get(f"{proxy.url}/health", timeout=CALL_SECONDS).json()["instances"]
    return any(one["role"] == "encoder" and one["state"] == "healthy" for one in instances)


def _prefilled(fleet: Fleet, body: Body) -> Body:
    """Have the prefill instance compute a prompt; return what the request to a decode instance then has in addition."""
    answer = fleet.prefill.post(json.loads(vllm_prefill_body(json.dumps(body).encode(), "/v1/chat/completions")))
    assert answer.status_code == 200, answer.text
    return {"kv_transfer_params": answer.json()["kv_transfer_params"]}
