"""Answers that begin at a prefill instance and continue at a decode instance."""

from __future__ import annotations

import http.client
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import pytest

from chiasm.engine.request import GenerateRequest, Output
from chiasm.errors import KVUnavailableError
from chiasm.wire import KV_RELEASE_PATH
from tests.server.conftest import Served, ServedEncoder
from tests.server.fake_engine import SEED, never
from tests.server.images import chat, embeds_part, image_part, png
from tests.server.serving import Reply, post

A = "a" * 64
ELSEWHERE = {"do_remote_decode": True}
CONTINUES = {"do_remote_decode": True, "continues": True}
VLLM = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
"""As vLLM's proxies send it."""
HANDLE: dict[str, Any] = {
    "do_remote_prefill": True,
    "remote_engine_id": "engine-p",
    "remote_block_ids": [4, 7],
    "remote_host": "p.example",
    "remote_port": 7001,
    "remote_request_id": "r-1",
    "num_tokens": 2,
    "digest": "d1",
}


def hi(**fields: Any) -> dict[str, Any]:
    return chat("Hi", **fields)


def letters(text: str) -> list[int]:
    """Return the token ids of the fake engine's tokenizer."""
    from tests.server.fake_engine import ByteProcessor

    ids: list[int] = ByteProcessor().tokenizer.encode(text).ids
    return ids


def handle_of(reply: Reply) -> dict[str, Any]:
    """Return the handle with which an answer continues, from a stream or a body."""
    assert reply.status == 200, reply.body
    if reply.headers["content-type"].startswith("application/json"):
        found: dict[str, Any] = reply.json["kv_transfer_params"]
        return found
    last = reply.body.decode().removesuffix("\n\n").split("\n\n")[-1]
    assert last.startswith(": kv_transfer_params ")
    handle: dict[str, Any] = json.loads(last.removeprefix(": kv_transfer_params "))
    return handle


def deltas(reply: Reply) -> list[dict[str, Any]]:
    return [event["choices"][0]["delta"] for event in reply.events if event != "[DONE]" and event["choices"]]


def text_of(*replies: Reply) -> str:
    return "".join(delta.get("content", "") for reply in replies for delta in deltas(reply))


ROLE = {"role": "assistant", "content": ""}


class TestPrefillForVLLMsProxies:
    """They send max_tokens=1 and no stream, and the response has a handle."""

    def test_answers_with_a_handle(self, prefill: Served) -> None:
        reply = post(prefill.chat, hi(max_tokens=1, stream=False, kv_transfer_params=VLLM))
        assert reply.json["choices"][0]["message"]["content"] == "H"
        assert reply.json["choices"][0]["finish_reason"] == "length"
        handle = handle_of(reply)
        assert handle["do_remote_prefill"] is True
        assert handle["remote_engine_id"] == "engine-p"
        assert handle["remote_block_ids"] == [4, 7]
        assert (handle["remote_host"], handle["remote_port"]) == ("p.example", 7001)
        assert handle["output_token_ids"] == letters("H")

    def test_text_completions_too(self, prefill: Served) -> None:
        reply = post(prefill.completions, {"prompt": "Hi", "max_tokens": 1, "kv_transfer_params": VLLM})
        assert reply.json["choices"][0]["text"] == "H"
        assert handle_of(reply)["output_token_ids"] == letters("H")

    def test_a_stream_is_refused(self, prefill: Served) -> None:
        reply = post(prefill.chat, hi(stream=True, kv_transfer_params=ELSEWHERE))
        assert (reply.status, reply.error["param"]) == (400, "stream")

    @pytest.mark.parametrize("params", [None, {}, {"do_remote_decode": False}, {"do_remote_prefill": True}])
    def test_an_answer_that_does_not_continue_elsewhere_is_refused(self, prefill: Served, params: Any) -> None:
        reply = post(prefill.chat, hi(kv_transfer_params=params))
        assert (reply.status, reply.error["param"]) == (400, "kv_transfer_params")
        assert "only prefills" in reply.error["message"]
        assert "proxy" in reply.error["message"]
        assert prefill.engine.requests == []

    def test_items_are_placed_by_their_size(self, prefill: Served) -> None:
        body = chat("See ", embeds_part(A, image_size=[28, 56]), kv_transfer_params=ELSEWHERE)
        assert post(prefill.chat, body).status == 200
        (item,) = prefill.engine.requests[0].prompt.items
        assert (item.identifier, item.offset, item.length) == (A, 4, 2)

    def test_images_are_refused(self, prefill: Served) -> None:
        assert post(prefill.chat, chat(image_part(png()), kv_transfer_params=ELSEWHERE)).status == 400


class TestPrefillOfAnAnswerThatContinues:
    """The sender relays both parts as one answer, and leaves the client's fields unchanged."""

    def test_stream_begins_and_ends_with_a_handle(self, prefill: Served) -> None:
        body = hi(stream=True, stream_options={"include_usage": True}, kv_transfer_params=CONTINUES)
        reply = post(prefill.chat, body)
        assert reply.headers["content-type"].startswith("text/event-stream")
        assert deltas(reply) == [ROLE, {"content": "H"}]
        assert all(event["choices"][0]["finish_reason"] is None for event in reply.events)
        handle = handle_of(reply)
        assert handle["num_sent"] == 1
        assert handle["created"] == reply.events[0]["created"]
        assert handle["continues"] is True
        assert b"[DONE]" not in reply.body

    def test_answer_without_a_stream_contains_the_handle(self, prefill: Served) -> None:
        reply = post(prefill.chat, hi(max_tokens=4, kv_transfer_params=CONTINUES))
        assert prefill.engine.requests[0].sampling.max_tokens == 4
        handle = handle_of(reply)
        assert "num_sent" not in handle
        assert handle["created"] == reply.json["created"]
        assert handle["seed"] == SEED

    def test_logprobs_of_the_first_token_are_sent_and_handed_over(self, prefill: Served) -> None:
        reply = post(prefill.chat, hi(stream=True, logprobs=True, top_logprobs=1, kv_transfer_params=CONTINUES))
        assert reply.events[1]["choices"][0]["logprobs"]["content"][0]["logprob"] == -0.5
        assert handle_of(reply)["output_logprobs"] == [[-0.5, [[0, -0.5]], *letters("H")]]

    @pytest.mark.parametrize("text", ["", "H"])
    def test_text_that_may_become_a_stop_string_is_left_to_decode(self, prefill: Served, text: str) -> None:
        async def script(request: GenerateRequest) -> AsyncIterator[Output]:
            async for output in prefill.engine.prefill(request):
                yield replace(output, text=text)

        prefill.engine.script = script
        reply = post(prefill.chat, hi(stream=True, kv_transfer_params=CONTINUES))
        assert deltas(reply) == [ROLE, *([{"content": text}] if text else [])]
        assert handle_of(reply)["num_sent"] == 1

    @pytest.mark.parametrize("stream", [False, True])
    def test_answer_that_ends_with_the_first_token_is_complete(self, prefill: Served, pd: Served, stream: bool) -> None:
        fields = {"max_tokens": 1, "stream": stream}
        replies = [
            post(instance.chat, body, {"X-Request-Id": "same"})
            for instance, body in ((prefill, hi(kv_transfer_params=CONTINUES, **fields)), (pd, hi(**fields)))
        ]
        if stream:
            first, second = ([deltas(reply), reply.events[-2:][1:]] for reply in replies)
            assert replies[0].events[-2]["choices"][0]["finish_reason"] == "length"
        else:
            first, second = ([reply.json["choices"], reply.json["usage"]] for reply in replies)
            assert "kv_transfer_params" not in replies[0].json
        assert first == second

    def test_resumed_answer_shows_only_new_text(self, prefill: Served) -> None:
        params = CONTINUES | {"output_token_ids": letters("Hel"), "num_sent": 3, "created": 12345, "seed": 7}
        reply = post(prefill.chat, hi(stream=True, kv_transfer_params=params))
        assert deltas(reply) == [{"content": "l"}]
        assert reply.events[0]["created"] == 12345
        handle = handle_of(reply)
        assert handle["output_token_ids"] == letters("Hell")
        assert (handle["num_sent"], handle["created"]) == (4, 12345)

    def test_resumed_answer_that_ends_is_complete(self, prefill: Served) -> None:
        params = CONTINUES | {"output_token_ids": letters("Hell"), "num_sent": 4}
        options = {"include_usage": True}
        reply = post(prefill.chat, hi(stream=True, stream_options=options, kv_transfer_params=params))
        assert deltas(reply) == [{"content": "o"}, {}]
        assert reply.events[-2]["usage"]["completion_tokens"] == 5
        assert reply.events[-1] == "[DONE]"

    def test_error_while_a_resumed_answer_waits_keeps_its_status(self, prefill: Served) -> None:
        async def script(request: GenerateRequest) -> AsyncIterator[Output]:
            yield replace(prefill.engine.output(request, "Hel"), already_sent=True)
            raise KVUnavailableError("gone")

        prefill.engine.script = script
        params = CONTINUES | {"output_token_ids": letters("Hel"), "num_sent": 3}
        reply = post(prefill.chat, hi(stream=True, kv_transfer_params=params))
        assert (reply.status, reply.error["type"]) == (503, "kv_unavailable_error")


class TestPrefillOfSeveralChoices:
    """Only the prompt is computed: each choice samples its first token at the decode instance."""

    @pytest.mark.parametrize("stream", [False, True])
    def test_several_choices_are_one_prompt(self, prefill: Served, stream: bool) -> None:
        reply = post(prefill.chat, hi(n=3, seed=5, stream=stream, stop=["x"], kv_transfer_params=CONTINUES))
        (request,) = prefill.engine.requests
        assert request.num_choices == 1
        handle = handle_of(reply)
        assert "output_token_ids" not in handle
        assert "num_sent" not in handle
        assert handle["seed"] == 5
        assert handle["continues"] is True
        assert "created" in handle
        if stream:
            assert reply.events == []

    @pytest.mark.parametrize("stream", [False, True])
    def test_several_prompts_have_a_handle_each(self, prefill: Served, stream: bool) -> None:
        body = {"prompt": ["Hi", "You"], "stream": stream, "logprobs": 1, "kv_transfer_params": CONTINUES}
        handle = handle_of(post(prefill.completions, body))
        assert list(handle) == ["prompts"]
        assert [one["num_tokens"] for one in handle["prompts"]] == [2, 3]
        assert all("output_token_ids" not in one and "output_logprobs" not in one for one in handle["prompts"])

    def test_fields_that_end_an_answer_do_not_affect_the_prompt(self, prefill: Served) -> None:
        reply = post(prefill.chat, hi(n=2, max_tokens=1, stop=["H"], kv_transfer_params=CONTINUES))
        assert handle_of(reply)["num_tokens"] == 2
        sampling = prefill.engine.requests[0].sampling
        assert sampling.ignore_eos
        assert sampling.stop == ()

    def test_clients_fields_are_checked_nevertheless(self, prefill: Served) -> None:
        assert post(prefill.chat, hi(n=2, temperature=-1, kv_transfer_params=CONTINUES)).error["param"] == "temperature"

    def test_several_choices_cannot_be_resumed(self, prefill: Served) -> None:
        params = CONTINUES | {"output_token_ids": letters("H")}
        assert post(prefill.chat, hi(n=2, kv_transfer_params=params)).status == 400
        body = {"prompt": ["a", "b"], "kv_transfer_params": params}
        assert post(prefill.completions, body).status == 400

    def test_what_came_with_several_choices_is_checked_too(self, prefill: Served) -> None:
        params = CONTINUES | {"seed": 1 << 64}
        assert post(prefill.chat, hi(n=2, kv_transfer_params=params)).error["param"] == "kv_transfer_params"


class TestDecode:
    @pytest.mark.parametrize("seed", [-(1 << 63), (1 << 63) - 1])
    def test_takes_every_seed_that_a_request_may_have(self, prefill: Served, decode: Served, seed: int) -> None:
        handle = handle_of(post(prefill.chat, hi(seed=seed, kv_transfer_params=CONTINUES)))
        assert handle["seed"] == seed
        assert post(decode.chat, hi(seed=seed, kv_transfer_params=HANDLE | {"seed": seed})).status == 200

    def test_continues_from_a_handle(self, decode: Served) -> None:
        reply = post(decode.chat, hi(kv_transfer_params=HANDLE | {"output_token_ids": letters("H"), "unknown": 1}))
        assert reply.json["choices"][0]["message"]["content"] == "Hello"
        assert reply.json["usage"]["completion_tokens"] == 5
        assert "kv_transfer_params" not in reply.json
        given = decode.engine.requests[0].kv_transfer_params
        assert given is not None
        assert given.remote_block_ids == [4, 7]
        assert given.digest == "d1"

    def test_stream_begins_with_what_was_not_sent(self, decode: Served) -> None:
        reply = post(decode.chat, hi(stream=True, kv_transfer_params=HANDLE | {"output_token_ids": letters("H")}))
        assert deltas(reply) == [ROLE, *[{"content": letter} for letter in "Hello"], {}]

    def test_what_was_sent_counts_and_is_not_sent_again(self, decode: Served) -> None:
        params = HANDLE | {"output_token_ids": letters("He"), "num_sent": 1, "created": 777}
        options = {"include_usage": True, "continuous_usage_stats": True}
        reply = post(decode.chat, hi(stream=True, stream_options=options, kv_transfer_params=params))
        assert deltas(reply) == [{"content": "e"}, {"content": "l"}, {"content": "l"}, {"content": "o"}, {}]
        assert [event["usage"]["completion_tokens"] for event in reply.events[:-1]] == [2, 3, 4, 5, 5, 5]
        assert {event["created"] for event in reply.events[:-1]} == {777}

    @pytest.mark.parametrize("token_ids", [[], letters("H")], ids=["from version 0.3", "with token ids"])
    def test_log_probabilities_reach_the_engine_with_their_token_ids(
        self, decode: Served, token_ids: list[int]
    ) -> None:
        logprobs = [[-0.5, [], *token_ids]]
        params = HANDLE | {"output_token_ids": letters("H"), "output_logprobs": logprobs}
        assert post(decode.chat, hi(logprobs=True, kv_transfer_params=params)).status == 200
        given = decode.engine.requests[0].kv_transfer_params
        assert given is not None
        assert [entry.token_id for entry in given.output_logprobs] == letters("H")

    def test_offsets_count_what_was_sent(self, decode: Served) -> None:
        logprobs = [[-0.5, [], token_id] for token_id in letters("He")]
        params = HANDLE | {"output_token_ids": letters("He"), "num_sent": 2, "output_logprobs": logprobs}
        body = {"prompt": "Hi", "logprobs": 0, "stream": True, "kv_transfer_params": params}
        events = post(decode.completions, body).events
        assert [event["choices"][0]["logprobs"]["text_offset"] for event in events[:-2]] == [[2], [3], [4]]

    def test_answer_that_came_with_all_its_tokens_ends_at_once(self, decode: Served) -> None:
        params = HANDLE | {"output_token_ids": letters("H")}
        reply = post(decode.chat, hi(max_tokens=1, kv_transfer_params=params))
        assert reply.json["choices"][0]["message"]["content"] == "H"
        assert reply.json["choices"][0]["finish_reason"] == "length"

    def test_two_halves_make_one_answer(self, prefill: Served, decode: Served, pd: Served) -> None:
        same = {"X-Request-Id": "one-id"}
        options = {"include_usage": True}
        first = post(prefill.chat, hi(stream=True, stream_options=options, kv_transfer_params=CONTINUES), same)
        second = post(decode.chat, hi(stream=True, stream_options=options, kv_transfer_params=handle_of(first)), same)
        whole = post(pd.chat, hi(stream=True, stream_options=options), same)
        created = first.events[0]["created"]
        both = [event for event in first.events + second.events if event != "[DONE]"]
        assert all(event["created"] == created for event in both)
        expected = [event | {"created": created} for event in whole.events[:-1]]
        assert both == expected
        assert second.events[-1] == "[DONE]"

    def test_choices_sample_their_first_token_here(self, prefill: Served, decode: Served) -> None:
        first = post(prefill.chat, hi(n=2, stream=True, kv_transfer_params=CONTINUES))
        reply = post(decode.chat, hi(n=2, stream=True, kv_transfer_params=handle_of(first)))
        assert decode.engine.requests[0].num_choices == 2
        texts = ["", ""]
        for event in reply.events[:-1]:
            texts[event["choices"][0]["index"]] += event["choices"][0]["delta"].get("content", "")
        assert texts == ["Hello", "Hello"]
        assert deltas(reply)[:2] == [ROLE, ROLE]
        assert b": tokens" not in reply.body

    def test_several_prompts_continue_from_one_handle_each(self, prefill: Served, decode: Served) -> None:
        first = post(prefill.completions, {"prompt": ["Hi", "You"], "kv_transfer_params": CONTINUES})
        reply = post(decode.completions, {"prompt": ["Hi", "You"], "kv_transfer_params": handle_of(first)})
        assert [choice["text"] for choice in reply.json["choices"]] == ["Hello", "Hello"]
        given = [request.kv_transfer_params for request in decode.engine.requests]
        assert [params.num_tokens for params in given if params] == [2, 3]
        assert reply.json["created"] == handle_of(first)["prompts"][0]["created"]

    def test_items_are_placed_by_their_size(self, decode: Served) -> None:
        assert post(decode.chat, chat(embeds_part(A, image_size=[28, 56]), kv_transfer_params=HANDLE)).status == 200
        assert decode.engine.requests[0].prompt.items[0].length == 2

    def test_server_timing_has_the_transfer(self, decode: Served) -> None:
        assert post(decode.chat, hi(kv_transfer_params=HANDLE)).timing["kv"] == 5

    @pytest.mark.parametrize("stream", [False, True])
    def test_lost_kv_is_an_error_with_its_status(self, decode: Served, stream: bool) -> None:
        async def script(request: GenerateRequest) -> AsyncIterator[Output]:
            yield replace(decode.engine.output(request, "H"), already_sent=True)
            raise KVUnavailableError("the lease ran out")

        decode.engine.script = script
        params = HANDLE | {"output_token_ids": letters("H"), "num_sent": 1}
        reply = post(decode.chat, hi(stream=stream, kv_transfer_params=params))
        assert (reply.status, reply.error["type"]) == (503, "kv_unavailable_error")


class TestTokensAreAnnounced:
    """The proxy that relays the stream can have another instance continue from any of them."""

    def stream(self, decode: Served, **fields: Any) -> list[str]:
        params = HANDLE | {"continues": True, "output_token_ids": letters("H"), "num_sent": 1}
        reply = post(decode.chat, hi(stream=True, kv_transfer_params=params, **fields))
        return reply.body.decode().split("\n\n")

    def test_before_the_event_with_their_text(self, decode: Served) -> None:
        blocks = self.stream(decode)
        for block, letter in zip(blocks, "ello", strict=False):
            comment, data = block.split("\n")
            assert comment == f": tokens {letters(letter)[0]}"
            assert json.loads(data.removeprefix("data: "))["choices"][0]["delta"] == {"content": letter}

    def test_in_an_event_of_their_own_if_they_have_no_text(self, decode: Served) -> None:
        async def script(request: GenerateRequest) -> AsyncIterator[Output]:
            yield replace(decode.engine.output(request, "H"), already_sent=True)
            yield replace(decode.engine.output(request, "el"), text="")
            yield decode.engine.output(request, "lo", finish_reason="stop")

        decode.engine.script = script
        blocks = self.stream(decode)
        assert blocks[0] == ": tokens {} {}".format(*letters("el"))
        assert blocks[1].startswith(": tokens {} {}\ndata: ".format(*letters("lo")))
        assert blocks[2].startswith("data: ")

    def test_tokens_that_came_with_the_request_and_were_not_sent_too(self, decode: Served) -> None:
        params = HANDLE | {"continues": True, "output_token_ids": letters("He")}
        reply = post(decode.chat, hi(stream=True, kv_transfer_params=params))
        blocks = reply.body.decode().split("\n\n")
        assert json.loads(blocks[0].removeprefix("data: "))["choices"][0]["delta"] == ROLE
        assert blocks[1].startswith(": tokens {} {}\ndata: ".format(*letters("He")))

    def test_only_if_the_answer_continues(self, decode: Served) -> None:
        reply = post(decode.chat, hi(stream=True, kv_transfer_params=HANDLE))
        assert b": tokens" not in reply.body


class TestMalformedHandles:
    @pytest.mark.parametrize("missing", [name for name in HANDLE if name not in {"num_tokens", "digest"}])
    def test_decode_names_what_is_missing(self, decode: Served, missing: str) -> None:
        for without in (HANDLE | {missing: None}, {name: HANDLE[name] for name in HANDLE if name != missing}):
            if missing == "do_remote_prefill":
                without[missing] = False
            reply = post(decode.chat, hi(kv_transfer_params=without))
            assert (reply.status, reply.error["param"]) == (400, "kv_transfer_params")
            assert missing in reply.error["message"]
        assert decode.engine.requests == []

    @pytest.mark.parametrize("params", [None, {}])
    def test_decode_needs_one(self, decode: Served, params: Any) -> None:
        reply = post(decode.chat, hi(kv_transfer_params=params))
        assert reply.status == 400
        assert "only decodes" in reply.error["message"]

    @pytest.mark.parametrize(
        "fields",
        [
            {"remote_block_ids": "all"},
            {"remote_block_ids": [-1]},
            {"remote_block_ids": [1 << 40]},
            {"remote_block_ids": [1 << 80]},
            {"remote_port": 70_000},
            {"remote_port": "7001"},
            {"remote_host": 5},
            {"remote_host": "h" * 300},
            {"remote_request_id": ["r"]},
            {"do_remote_prefill": "yes"},
            {"num_tokens": -1},
            {"num_tokens": 3},
            {"num_tokens": 1 << 80},
            {"digest": 5},
            {"output_token_ids": [257]},
            {"output_token_ids": [-1]},
            {"output_token_ids": [1.5]},
            {"output_token_ids": [1] * 6},
            {"num_sent": 1},
            {"output_token_ids": [1], "num_sent": 2},
            {"output_token_ids": [1, 2], "output_logprobs": [[-0.5, []]]},
            {"output_token_ids": [1, 2], "output_logprobs": [[-0.5, [], 1]]},
            {"output_token_ids": [1], "output_logprobs": [[-0.5, [], 2]]},
            {"output_token_ids": [1], "output_logprobs": [[-0.5, [[400, -0.5]]]]},
            {"output_token_ids": [1], "output_logprobs": [-0.5]},
            {"output_token_ids": [1], "output_logprobs": [[None, []]]},
            {"seed": 1 << 64},
            {"seed": "x"},
            {"created": -1},
            {"created": 1 << 70},
            {"cached_tokens": 1 << 70},
            {"prompts": [{}]},
            {"prompts": [HANDLE, HANDLE]},
            {"prompts": [HANDLE | {"prompts": [HANDLE]}]},
            {"prompts": HANDLE},
        ],
        ids=str,
    )
    def test_contradictions_are_the_senders_error(self, decode: Served, fields: dict[str, Any]) -> None:
        reply = post(decode.chat, hi(max_tokens=5, kv_transfer_params=HANDLE | fields))
        assert reply.status == 400, reply.body
        assert reply.error["type"] == "invalid_request_error"
        assert reply.error["param"] == "kv_transfer_params"
        assert "kv_transfer_params" in reply.error["message"]
        assert decode.engine.requests == []

    def test_there_must_be_one_handle_for_each_prompt(self, decode: Served) -> None:
        for params in (HANDLE, {"prompts": [HANDLE]}, {"prompts": [HANDLE] * 3}):
            reply = post(decode.completions, {"prompt": ["Hi", "Ho"], "kv_transfer_params": params})
            assert reply.status == 400
            assert "one for each prompt" in reply.error["message"]

    def test_output_tokens_are_refused_with_several_choices(self, decode: Served) -> None:
        params = HANDLE | {"output_token_ids": [1]}
        assert post(decode.chat, hi(n=2, kv_transfer_params=params)).status == 400

    def test_requested_log_probabilities_must_come_with_the_tokens(self, decode: Served) -> None:
        params = HANDLE | {"output_token_ids": letters("He"), "num_sent": 1}
        assert post(decode.chat, hi(logprobs=True, kv_transfer_params=params)).status == 400
        assert post(decode.chat, hi(logprobs=True, kv_transfer_params=params | {"num_sent": 2})).status == 200

    @pytest.mark.parametrize(
        "params",
        [
            "yes",
            [],
            {"do_remote_decode": 1},
            CONTINUES | {"output_token_ids": [999]},
            CONTINUES | {"output_token_ids": [1] * 6},
        ],
    )
    def test_prefill_refuses_contradictions(self, prefill: Served, params: Any) -> None:
        reply = post(prefill.chat, hi(max_tokens=5, kv_transfer_params=params))
        assert (reply.status, reply.error["param"]) == (400, "kv_transfer_params")

    def test_text_that_is_not_unicode_is_refused(self, decode: Served) -> None:
        body = json.dumps(hi(kv_transfer_params=HANDLE | {"digest": "?"})).replace('"?"', '"\\ud800"')
        assert post(decode.chat, body.encode()).status == 400


class TestOtherRoles:
    @pytest.mark.parametrize("params", [ELSEWHERE, HANDLE])
    def test_pd_instances_refuse_the_field(self, pd: Served, params: dict[str, Any]) -> None:
        for reply in (
            post(pd.chat, hi(kv_transfer_params=params)),
            post(pd.completions, {"prompt": "Hi", "kv_transfer_params": params}),
        ):
            assert (reply.status, reply.error["param"]) == (400, "kv_transfer_params")
            assert "not supported" in reply.error["message"]

    def test_encoder_refuses_the_field(self, encoder: ServedEncoder) -> None:
        reply = post(encoder.chat, chat(image_part(png(), uuid=A), kv_transfer_params=ELSEWHERE))
        assert (reply.status, reply.error["param"]) == (400, "kv_transfer_params")

    @pytest.mark.parametrize("params", [None, {}])
    def test_an_empty_field_is_accepted(self, pd: Served, encoder: ServedEncoder, params: Any) -> None:
        assert post(pd.chat, hi(kv_transfer_params=params)).status == 200
        assert post(encoder.chat, chat(image_part(png(), uuid=A), kv_transfer_params=params)).status == 200


class TestKVThatNobodyFetches:
    """It is given back by the name that the sender has given it."""

    def test_a_sender_gives_it_back(self, prefill: Served) -> None:
        reply = post(prefill.url + KV_RELEASE_PATH, {"leases": ["one", "two"]})
        assert reply.status == 204
        assert {prefill.engine.given_back.get_nowait() for _ in range(2)} == {"one", "two"}

    @pytest.mark.parametrize(
        "body", [{"leases": "one"}, {"leases": [1]}, {"leases": ["x" * 257]}, {"leases": ["x"] * 1025}]
    )
    def test_what_is_not_a_list_of_names_is_refused(self, prefill: Served, body: dict[str, Any]) -> None:
        assert post(prefill.url + KV_RELEASE_PATH, body).status == 400

    def test_other_roles_hold_none(self, decode: Served) -> None:
        assert post(decode.url + KV_RELEASE_PATH, {"leases": ["one"]}).status == 404

    @pytest.mark.parametrize("streams", [True, False])
    def test_a_handle_that_could_not_be_sent_is_given_back(self, prefill: Served, streams: bool) -> None:
        """The client leaves while its prompt is computed."""
        prefill.engine.script = never
        body = hi(stream=streams, kv_transfer_params={**CONTINUES, "lease": "mine"})
        connection = http.client.HTTPConnection(urlsplit(prefill.url).netloc)
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        prefill.engine.started.get(timeout=60)
        connection.close()
        assert prefill.engine.given_back.get(timeout=60) == "mine"
