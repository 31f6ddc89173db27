"""What a server of vLLM tells of where the time of a request went; the clocks of server and engine are moved by hand."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from chiasm.http.timing import TimingEntry, read_timing
from chiasm.integrations.vllm import stages as stages_module
from chiasm.integrations.vllm.outputs import PREFILL_WORK, WAITS
from chiasm.integrations.vllm.stages import Stages
from chiasm.integrations.vllm.waits import Wait

from .engine import Clock

AHEAD = 1000.0
"""By how much the clock of the engine is ahead of the server's."""
STREAM = [(b"content-type", b"text/event-stream; charset=utf-8")]
JSON = [(b"content-type", b"application/json")]
WITH_IMAGE = {"prompt_token_ids": [1] * 5, "mm_placeholders": {"image": [2]}}
TEXT = {"prompt_token_ids": [1] * 5}
REMOTE = {"kv_transfer_params": {"do_remote_prefill": True, "remote_host": "p"}}


def output(
    scheduled: float, first: float, last: float | None = None, params: dict[str, Any] | None = None
) -> SimpleNamespace:
    """Return vLLM's RequestOutput, given when its engine began with the request and had its tokens, on the server's clock."""
    times = SimpleNamespace(
        queued_ts=AHEAD,
        scheduled_ts=AHEAD + scheduled,
        first_token_ts=AHEAD + first,
        last_token_ts=AHEAD + (first if last is None else last),
    )
    return SimpleNamespace(
        metrics=times, outputs=[], prompt_token_ids=[1] * 5, num_cached_tokens=2, ec_transfer_params=params
    )


@dataclass
class VLLM:
    """vLLM's application, and the client of its engine, which answer as long as the clock stands still."""

    clock: Clock
    outputs: Sequence[tuple[float, SimpleNamespace]]
    """What the engine hands out, and at what time the server has it."""
    prompt: Any = None
    params: Any = field(default_factory=SimpleNamespace)
    pools: bool = False
    before: Sequence[Message] = ()
    """What the application sends between the head and the first output, as the API of responses does."""
    headers: list[tuple[bytes, bytes]] = field(default_factory=lambda: STREAM)
    prepared_at: float = 1.0
    log_stats: bool = True
    generations: int = 1
    has_ended: bool = False
    handed_out: list[Any] = field(default_factory=list)
    """Outputs as the application gets them."""

    def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, *, priority: int = 0
    ) -> AsyncGenerator[Any, None]:
        return self._outputs()

    def encode(
        self, prompt: Any, pooling_params: Any, request_id: str, *, priority: int = 0
    ) -> AsyncGenerator[Any, None]:
        return self._outputs()

    async def _outputs(self) -> AsyncGenerator[Any, None]:
        try:
            for at, one in self.outputs:
                self.clock.now = at
                yield one
        finally:
            self.has_ended = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.clock.now = self.prepared_at
        await send({"type": "http.response.start", "status": 200, "headers": self.headers})
        for message in self.before:
            await send(message)
        for generated in [self._generated(number) for number in range(self.generations)]:
            async for one in generated:
                self.handed_out.append(one)
                if self.headers == STREAM:
                    await send({"type": "http.response.body", "body": b"data: a\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b"end", "more_body": False})

    def _generated(self, number: int) -> AsyncIterator[Any]:
        client: Any = self
        if self.pools:  # with names, as vLLM calls it
            generated: AsyncIterator[Any] = client.encode(
                request_id=f"pool-{number}", prompt=self.prompt, pooling_params=self.params
            )
        else:
            generated = client.generate(self.prompt, self.params, f"chat-{number}", priority=1)
        return generated


def serve(vllm: VLLM, ec: SimpleNamespace | None = None, *, runner: str = "generate") -> Stages:
    stages = Stages(vllm.clock)
    config = SimpleNamespace(ec_transfer_config=ec, model_config=SimpleNamespace(runner_type=runner))
    stages.watch(SimpleNamespace(engine_client=vllm, vllm_config=config))
    return stages


async def answer(stages: Stages, vllm: VLLM, send: Callable[[Message], None] | None = None) -> list[TimingEntry]:
    """Have a request answered that comes at 0 s; return what the head of its answer tells."""
    sent: list[Message] = []

    async def receive() -> Message:
        raise AssertionError("the body has been read")

    async def note(message: Message) -> None:
        sent.append(message)
        if send is not None:
            send(message)

    vllm.clock.now = 0.0
    await stages.run(vllm, {"type": "http"}, receive, note)
    assert [one["type"] for one in sent[:2]] == ["http.response.start", "http.response.body"]
    assert sent[-1]["body"] == b"end"
    head = dict(sent[0]["headers"])
    assert head[b"content-type"] == dict(vllm.headers)[b"content-type"]
    return read_timing(head.get(b"server-timing", b"").decode())


def told(entries: Sequence[TimingEntry]) -> dict[str, tuple[float, float | None]]:
    """Return seconds and beginning of each entry, of those that aren't counts."""
    rounded = {one.name: (one.seconds, one.at) for one in entries if one.seconds is not None}
    assert len({one.name for one in entries}) == len(entries)
    return rounded


def pd() -> SimpleNamespace:
    return SimpleNamespace(is_ec_producer=False, is_ec_consumer=True)


async def test_a_stream_tells_its_stages_in_the_head_that_comes_with_the_first_token() -> None:
    vllm = VLLM(Clock(), [(4.0, output(2.0, 3.5)), (5.0, output(2.0, 3.5, 4.5))], TEXT)
    heads: list[float] = []
    entries = await answer(serve(vllm), vllm, lambda message: heads.append(vllm.clock.now))
    assert heads[:2] == [4.0, 4.0]
    # The engine's first token came 0.5 s before the server had it, and is taken for the same instant.
    assert told(entries) == {"queue": (1.5, 1.0), "wait": (0.0, None), "prefill": (1.5, 2.5), "ttft": (4.0, None)}
    assert {one.name: one.description for one in entries if one.seconds is None} == {
        "prompt_tokens": "5",
        "cached_tokens": "2",
    }


async def test_a_whole_answer_tells_when_its_first_token_was_there() -> None:
    vllm = VLLM(Clock(), [(9.0, output(2.0, 3.0, 8.0))], TEXT, headers=JSON)
    assert told(await answer(serve(vllm), vllm)) == {
        "queue": (2.0, 1.0),
        "wait": (0.0, None),
        "prefill": (1.0, 3.0),
        "ttft": (4.0, None),
        "total": (9.0, None),
    }


async def test_waits_for_embeddings_are_no_part_of_queue_and_prefill() -> None:
    waits = [Wait(AHEAD + 1.5, AHEAD + 2.0, 0), Wait(AHEAD + 3.0, AHEAD + 4.0, 1), Wait(AHEAD + 6.0, AHEAD + 7.0, 0)]
    first = output(2.0, 5.0, params={WAITS: [list(wait) for wait in waits], "mine": 1})
    vllm = VLLM(Clock(), [(5.0, first)], WITH_IMAGE)
    entries = await answer(serve(vllm, pd()), vllm)
    assert [one for one in entries if one.name == "stall"] == [
        TimingEntry("stall", 0.5, at=1.5),
        TimingEntry("stall", 1.0, at=3.0),
    ]
    assert told([one for one in entries if one.name != "stall"]) == {
        "queue": (0.5, 1.0),
        "wait": (1.5, None),
        "prefill": (2.0, 2.0),
        "ttft": (5.0, None),
        "item0": (1.0, 1.0),
        "item1": (3.0, 1.0),
    }
    assert {one.description for one in entries if one.name.startswith("item")} == {"waited"}
    assert vllm.handed_out[0].ec_transfer_params == {"mine": 1}


@pytest.mark.parametrize("headers", [STREAM, JSON])
async def test_the_cost_of_a_prompt_is_told_with_its_tokens(headers: list[tuple[bytes, bytes]]) -> None:
    vllm = VLLM(Clock(), [(5.0, output(2.0, 5.0, params={PREFILL_WORK: 1.5}))], TEXT, headers=headers)
    entries = await answer(serve(vllm), vllm)
    assert told(entries)["prefill_work"] == (1.5, None)
    assert {"prompt_tokens", "cached_tokens"} <= {one.name for one in entries}


async def test_what_the_engine_tells_never_reaches_the_client() -> None:
    """Not even of a request whose stages aren't told."""
    vllm = VLLM(
        Clock(),
        [(2.0, output(1.0, 2.0, params={WAITS: [], PREFILL_WORK: 1.0})) for _ in range(2)],
        generations=2,
    )
    await answer(serve(vllm), vllm)
    assert [one.ec_transfer_params for one in vllm.handed_out] == [None] * 4


async def test_an_encoder_tells_the_stages_of_each_image() -> None:
    items = {"a": {"item_indices": [0, 2], "metadata": {}}, "b": {"item_indices": [1]}}
    vllm = VLLM(Clock(), [(4.0, output(2.0, 4.0, params=items))], WITH_IMAGE, headers=JSON)
    entries = await answer(serve(vllm, SimpleNamespace(is_ec_producer=True, is_ec_consumer=False)), vllm)
    assert told(entries) == {
        **{f"preprocess{index}": (1.0, 0.0) for index in range(3)},
        **{f"encode{index}": (2.0, 2.0) for index in range(3)},
        "total": (4.0, None),
    }
    assert vllm.handed_out[0].ec_transfer_params == items


async def test_a_decode_instance_tells_when_it_had_the_kv() -> None:
    params = SimpleNamespace(extra_args=REMOTE)
    vllm = VLLM(Clock(), [(4.0, output(3.0, 4.0))], TEXT, params)
    entries = await answer(serve(vllm, pd()), vllm)
    assert told(entries) == {"kv": (2.0, None), "wait": (0.0, None), "prefill": (1.0, None), "ttft": (4.0, None)}
    assert len(entries) == 4


async def test_the_prompt_of_an_instance_that_has_encoded_meanwhile_says_nothing_of_the_cost_of_prefill() -> None:
    for prompt, is_told in ((WITH_IMAGE, False), (TEXT, True)):
        vllm = VLLM(Clock(), [(4.0, output(2.0, 4.0))], prompt)
        entries = await answer(serve(vllm), vllm)
        assert ("prompt_tokens" in {one.name for one in entries}) == is_told


async def test_a_request_of_several_prompts_tells_the_stages_of_the_first_to_answer() -> None:
    vllm = VLLM(Clock(), [(4.0, output(2.0, 4.0))], TEXT, generations=2, headers=JSON)
    entries = await answer(serve(vllm), vllm)
    assert told(entries)["prefill"] == (2.0, 2.0)
    assert "prompt_tokens" not in {one.name for one in entries}


def piece(body: bytes) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": True}


async def test_what_a_stream_has_before_its_first_token_comes_with_it() -> None:
    """As the events by which the API of responses says that it has begun."""
    vllm = VLLM(Clock(), [(4.0, output(2.0, 3.5)), (5.0, output(2.0, 3.5, 4.5))], TEXT)
    vllm.before = [piece(b"created"), piece(b"in progress")]
    sent: list[tuple[float, object]] = []
    entries = await answer(serve(vllm), vllm, lambda message: sent.append((vllm.clock.now, message.get("body"))))
    assert sent[:4] == [(4.0, None), (4.0, b"created"), (4.0, b"in progress"), (4.0, b"data: a\n\n")]
    assert told(entries)["ttft"] == (4.0, None)


async def test_what_comes_before_the_first_token_is_held_back_up_to_a_bound() -> None:
    vllm = VLLM(Clock(), [(4.0, output(2.0, 3.5))], TEXT, before=[piece(b"x" * (1 << 20))] * 6)
    sent: list[float] = []
    assert await answer(serve(vllm), vllm, lambda message: sent.append(vllm.clock.now)) == []
    assert sent[:7] == [1.0] * 7


async def test_a_stream_whose_engine_tells_no_times_comes_as_it_is_made(caplog: pytest.LogCaptureFixture) -> None:
    """Neither one of another version of vLLM, nor one that the engine gives up before it has run."""
    for first in (SimpleNamespace(outputs=[], metrics=SimpleNamespace()), output(-AHEAD, 4.0)):
        vllm = VLLM(Clock(), [(4.0, first), (5.0, first)], TEXT)
        sent: list[float] = []
        await answer(serve(vllm), vllm, lambda message, now=vllm.clock, to=sent: to.append(now.now))  # type: ignore[misc]
        assert sent == [4.0, 4.0, 5.0, 5.0]


async def test_a_stream_that_ends_without_an_output_is_not_held_back() -> None:
    """vLLM sends an error as an event, and what ends the stream after it."""
    vllm = VLLM(Clock(), [], TEXT, before=[piece(b"error")])
    sent: list[Message] = []
    assert await answer(serve(vllm), vllm, sent.append) == []
    assert [one.get("body") for one in sent] == [None, b"error", b"end"]


async def test_a_prompt_that_is_pooled_tells_when_that_was_done_and_no_token() -> None:
    vllm = VLLM(Clock(), [(4.0, output(2.0, 3.5))], TEXT, params=None, headers=JSON, pools=True)
    entries = await answer(serve(vllm), vllm)
    assert told(entries) == {
        "queue": (1.5, 1.0),
        "wait": (0.0, None),
        "prefill": (1.5, 2.5),
        "pooled": (4.0, None),
        "total": (4.0, None),
    }
    assert {one.name for one in entries if one.seconds is None} == {"prompt_tokens", "cached_tokens"}


async def test_a_request_that_failed_before_it_ran_tells_nothing() -> None:
    vllm = VLLM(Clock(), [(4.0, output(-AHEAD, 4.0))], TEXT)
    assert await answer(serve(vllm), vllm) == []


async def test_what_another_version_of_vllm_has_in_another_way_costs_the_stages_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    vllm = VLLM(Clock(), [(4.0, SimpleNamespace(outputs=[], metrics=SimpleNamespace()))], TEXT)
    stages = serve(vllm)
    with caplog.at_level(logging.WARNING):
        assert await answer(stages, vllm) == []
        assert await answer(stages, vllm) == []
    assert len(caplog.records) == 1
    assert "scheduled_ts" in caplog.text


async def test_a_server_that_keeps_no_times_says_so_at_start(caplog: pytest.LogCaptureFixture) -> None:
    vllm = VLLM(Clock(), [(4.0, output(2.0, 4.0))], TEXT, log_stats=False)
    stages = serve(vllm)
    assert "--disable-log-stats" in caplog.text
    assert await answer(stages, vllm) == []


@pytest.mark.parametrize("are_kept", [True, False])
async def test_a_server_that_pools_tells_stages_if_the_times_are_kept(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, are_kept: bool
) -> None:
    monkeypatch.setattr(stages_module, "keep_times", lambda: are_kept)
    vllm = VLLM(Clock(), [(4.0, output(2.0, 4.0))], TEXT, headers=JSON, pools=True)
    entries = await answer(serve(vllm, runner="pooling"), vllm)
    assert ("pooled" in told(entries), "keeps no times" in caplog.text) == (are_kept, not are_kept)


async def test_an_answer_that_is_given_up_ends_in_the_engine_as_well() -> None:
    vllm = VLLM(Clock(), [(float(at), output(1.0, 2.0)) for at in range(2, 9)], TEXT)
    serve(vllm)
    client: Any = vllm
    outputs = client.generate(TEXT, SimpleNamespace(), "chat")
    await anext(outputs)
    assert not vllm.has_ended
    await outputs.aclose()
    assert vllm.has_ended
