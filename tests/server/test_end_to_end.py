"""Real engines behind real servers: a random checkpoint, greedy answers that depend on every token and pixel."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from chiasm.ec_transfer import ECTransferConfig, ECTransferRole
from chiasm.engine import EngineConfig, create_engine
from chiasm.media import identifier
from chiasm.server import app, create_app
from chiasm.wire import AWAITED_PATH, PLACES_PATH, Role
from tests.server.images import chat, embeds_part, image_part, png
from tests.server.serving import Listening, Reply, begun, eventually, get, post, serving

RED = png(64, 48, "red")
BLUE = png(48, 64, "blue")


@dataclass
class Live(Listening):
    """A real engine behind a real server."""

    engine: Any

    def name(self, image: bytes) -> str:
        return identifier(image, fingerprint=self.engine.model_fingerprint)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def live(model: Path, store: Path) -> Iterator[Callable[[Role], Live]]:
    """Return a function that starts the instance of a role when a test first asks for it.

    They compute in float32, in which equal requests have equal answers, whatever the steps that they are computed in. And
    their engines have much time to say what was late, since they may be on a busy machine.
    """
    started: dict[Role, Live] = {}
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "_GRACE_SECONDS", 60)

        def start(role: Role) -> Live:
            if role not in started:
                ec_role = ECTransferRole.PRODUCER if role is Role.ENCODER else ECTransferRole.CONSUMER
                ec = (
                    None
                    if role is Role.AGGREGATED
                    else ECTransferConfig(role=ec_role, connector_extra_config={"shared_storage_path": store})
                )
                engine = create_engine(
                    EngineConfig(model, role, dtype="float32", threads=1, kv_cache_bytes=32 << 20, ec=ec)
                )
                engine.start()
                stack.callback(engine.stop)
                url = stack.enter_context(serving(create_app(engine, served_model_name="synthetic")))
                started[role] = Live(url, engine)
            return started[role]

        yield start


@pytest.fixture
def aggregated(live: Callable[[Role], Live]) -> Live:
    return live(Role.AGGREGATED)


@pytest.fixture
def pd(live: Callable[[Role], Live]) -> Live:
    return live(Role.PD)


@pytest.fixture
def encoder(live: Callable[[Role], Live]) -> Live:
    return live(Role.ENCODER)


def text_of(reply: Reply) -> str:
    assert reply.status == 200, reply.body
    text: str = reply.json["choices"][0]["message"]["content"]
    return text


def greedy(*parts: Any, **fields: Any) -> dict[str, Any]:
    return chat(*parts, temperature=0, max_tokens=12, **fields)


class TestText:
    def test_stream_gives_the_same_text_as_one_answer(self, pd: Live) -> None:
        whole = text_of(post(pd.chat, greedy("What is it?")))
        chunks = post(pd.chat, greedy("What is it?", stream=True)).events[1:-2]
        assert len(chunks) > 1
        assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == whole

    def test_max_tokens_ends_an_answer(self, pd: Live) -> None:
        answer = pd.client.chat.completions.create(
            model="synthetic", messages=[{"role": "user", "content": "Go on"}], max_tokens=7, temperature=0
        )
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 7

    @pytest.mark.parametrize("stream", [False, True])
    def test_stop_string_ends_an_answer_and_is_cut_off(self, pd: Live, stream: bool) -> None:
        whole = text_of(post(pd.chat, greedy("Go on")))
        stop = whole[3:6]
        reply = post(pd.chat, greedy("Go on", stop=stop, stream=stream))
        if stream:
            choices = [event["choices"][0] for event in reply.events[:-1]]
            text = "".join(choice["delta"].get("content", "") for choice in choices)
            last = choices[-1]
        else:
            text = text_of(reply)
            last = reply.json["choices"][0]
        assert text == whole[: whole.index(stop)]
        assert (last["finish_reason"], last["stop_reason"]) == ("stop", stop)

    def test_seed_repeats_an_answer_and_choices_differ(self, pd: Live) -> None:
        body = chat("Go on", temperature=2.0, top_k=0, top_p=1.0, max_tokens=12, n=3, seed=5)
        first, second = post(pd.chat, body).json, post(pd.chat, body).json
        texts = [choice["message"]["content"] for choice in first["choices"]]
        assert texts == [choice["message"]["content"] for choice in second["choices"]]
        assert len(set(texts)) == 3

    def test_greedy_choice_has_the_highest_logprob(self, pd: Live) -> None:
        reply = post(pd.chat, greedy("Go on", logprobs=True, top_logprobs=3))
        content = reply.json["choices"][0]["logprobs"]["content"]
        assert len(content) == 12
        assert "".join(entry["token"] for entry in content) == text_of(reply)
        for entry in content:
            assert len(entry["top_logprobs"]) == 3
            assert entry["logprob"] == entry["top_logprobs"][0]["logprob"] < 0

    def test_completion_of_token_ids_equals_that_of_their_text(self, pd: Live) -> None:
        token_ids = pd.engine.processor.tokenizer.encode("once upon").ids
        by_text, by_ids = (
            post(pd.completions, {"prompt": prompt, "temperature": 0}).json["choices"][0]["text"]
            for prompt in ("once upon", token_ids)
        )
        assert by_text == by_ids

    def test_same_prompt_again_comes_from_the_prefix_cache(self, pd: Live) -> None:
        body = greedy("the same long story " * 8)
        usages = [post(pd.chat, body).json["usage"] for _ in range(2)]
        assert usages[0]["prompt_tokens"] == usages[1]["prompt_tokens"]
        assert usages[1]["prompt_tokens_details"]["cached_tokens"] > 0

    def test_prompt_longer_than_the_context_is_refused(self, pd: Live) -> None:
        reply = post(pd.completions, {"prompt": [5] * pd.engine.max_model_len})
        assert reply.status == 400
        assert reply.error["code"] == "context_length_exceeded"

    def test_client_that_leaves_frees_the_engine(self, pd: Live) -> None:
        body = chat("Go on", stream=True, max_tokens=3000, ignore_eos=True)
        begun(pd.chat, body, stands_still=True).close()
        for line in (
            "chiasm_requests_running 0.0",
            "chiasm_kv_blocks_used 0.0",
            'chiasm_http_requests_total{path="/v1/chat/completions",status="499"} 1.0',
        ):
            eventually(lambda line=line: line in get(f"{pd.url}/metrics").body.decode().splitlines())  # type: ignore[misc]


class TestAggregated:
    def test_answer_depends_on_the_image(self, aggregated: Live) -> None:
        texts = [text_of(post(aggregated.chat, greedy(image_part(data), "What is it?"))) for data in (RED, BLUE, RED)]
        assert texts[0] == texts[2] != texts[1]

    def test_server_timing_counts_the_encoding(self, aggregated: Live) -> None:
        reply = post(aggregated.chat, greedy(image_part(png(32, 32, "green")), "What is it?"))
        assert 'item0;desc="encoded"' in reply.headers["server-timing"]
        assert (reply.timing["encode"] or 0) > 0


class TestEncoderAndPD:
    """The messages that the proxy sends."""

    def encode(self, encoder: Live, *images: bytes) -> Reply:
        return post(encoder.chat, chat(*[image_part(data, uuid=encoder.name(data)) for data in images], stream=False))

    def test_equals_aggregated(self, aggregated: Live, encoder: Live, pd: Live) -> None:
        params = self.encode(encoder, RED, BLUE).json["ec_transfer_params"]
        parts = [embeds_part(pd.name(data), **params[pd.name(data)]["metadata"]) for data in (RED, BLUE)]
        expected = text_of(post(aggregated.chat, greedy(image_part(RED), "and", image_part(BLUE), "?")))
        assert text_of(post(pd.chat, greedy(parts[0], "and", parts[1], "?"))) == expected

    def test_second_encoding_is_a_hit(self, encoder: Live) -> None:
        image = png(32, 64, "yellow")
        first, second = self.encode(encoder, image), self.encode(encoder, image)
        assert 'item0;desc="encoded"' in first.headers["server-timing"]
        assert 'item0;desc="hit"' in second.headers["server-timing"]
        assert first.json["ec_transfer_params"] == second.json["ec_transfer_params"]

    @pytest.mark.parametrize("stream", [False, True])
    def test_pd_called_first_waits_for_the_encoder(
        self, aggregated: Live, encoder: Live, pd: Live, stream: bool
    ) -> None:
        image = png(64, 64, "purple" if stream else "orange")
        expected = text_of(post(aggregated.chat, greedy("Look: ", image_part(image), "?")))
        part = embeds_part(pd.name(image), image_size=[64, 64])
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(post, pd.chat, greedy("Look: ", part, "?", stream=stream))
            eventually(lambda: b"chiasm_requests_stalled 1.0" in get(f"{pd.url}/metrics").body)
            assert not answer.done()
            assert self.encode(encoder, image).status == 200
            reply = answer.result()
        assert 'item0;desc="waited"' in reply.headers["server-timing"]
        if stream:
            assert "".join(event["choices"][0]["delta"].get("content", "") for event in reply.events[:-1]) == expected
        else:
            assert text_of(reply) == expected

    @pytest.mark.parametrize("stream", [False, True])
    def test_item_that_never_comes_fails_its_request_only(self, pd: Live, stream: bool) -> None:
        body = greedy(embeds_part("0" * 64, image_size=[64, 64]), "?", stream=stream)
        reply = post(pd.chat, body, {"X-Request-Deadline-Ms": "3000"})
        assert reply.status == 503
        assert reply.error["type"] == "embedding_unavailable_error"
        assert get(f"{pd.url}/health").status == 200
        assert len(text_of(post(pd.chat, greedy("Still well?")))) > 0

    def test_image_that_is_cut_off_is_the_clients_error(self, encoder: Live) -> None:
        reply = self.encode(encoder, png(200, 200, "red")[:-40])
        assert reply.status == 400
        assert self.encode(encoder, RED).status == 200

    def test_wrong_size_is_refused_or_fails_its_request_only(self, encoder: Live, pd: Live) -> None:
        self.encode(encoder, RED)
        reply = post(pd.chat, greedy(embeds_part(pd.name(RED), image_size=[128, 128]), "?"))
        assert reply.status == 503
        assert len(text_of(post(pd.chat, greedy("Still well?")))) > 0

    def test_health_of_encoder_and_pd_names_the_same_fingerprint_and_store(self, encoder: Live, pd: Live) -> None:
        first, second = (get(f"{instance.url}/health").json for instance in (encoder, pd))
        assert (first["role"], second["role"]) == ("encoder", "pd")
        assert first["fingerprint"] == second["fingerprint"]
        assert first["ec_store"] == second["ec_store"]

    def test_health_names_a_store_that_was_made_anew(self, encoder: Live, pd: Live, store: Path) -> None:
        before = get(f"{pd.url}/health").json["ec_store"]
        shutil.rmtree(store)
        now = get(f"{pd.url}/health").json["ec_store"]
        assert now not in ("", before)
        assert get(f"{encoder.url}/health").json["ec_store"] == now

    def test_places_and_awaited_embeddings_are_told(self, pd: Live) -> None:
        place = {"host": "127.0.0.1", "port": 9, "engine_id": "e"}
        assert post(f"{pd.url}{PLACES_PATH}", {"places": {"1" * 64: place}}).status == 204
        assert get(f"{pd.url}{AWAITED_PATH}").json["identifiers"] == []
        assert get(f"{pd.url}/v1/models").status == 200
