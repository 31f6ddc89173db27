"""How an engine of vLLM counts what it has to do, and how its HTTP server tells it to proxies."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from chiasm.integrations.vllm.load import ToldLoad
from chiasm.integrations.vllm.messages import LOAD_METHOD
from chiasm.integrations.vllm.outputs import PREFILL_WORK
from chiasm.integrations.vllm.work import EngineWork
from chiasm.wire import Load

from .engine import ROWS, Clock, Request, identifier_of, request

PRODUCER = SimpleNamespace(is_ec_producer=True, is_ec_consumer=False)
CONSUMER = SimpleNamespace(is_ec_producer=False, is_ec_consumer=True)
FREE_BLOCKS = 7


class Scheduler:
    """vLLM's scheduler as far as the count sees it: it counts the tokens of a step as computed when it has planned it."""

    def __init__(self, ec_config: SimpleNamespace | None) -> None:
        self.requests: dict[str, Any] = {}
        self.encoder_cache_manager = SimpleNamespace(cached={})
        self.kv_cache_manager = SimpleNamespace(block_pool=SimpleNamespace(get_num_free_blocks=lambda: FREE_BLOCKS))
        self.clock = Clock()
        self.work = EngineWork(self, ec_config, self.clock)

    def add(self, one: Request) -> None:
        added: Any = one
        added.num_prompt_tokens = one.num_tokens
        self.requests[one.request_id] = one

    def plan(self, drafts: dict[str, int] | None = None, /, **tokens: int) -> SimpleNamespace:
        """Plan a step with so many tokens of each request; their images are encoded if they have pixels."""
        inputs: dict[str, list[int]] = {}
        for name, count in tokens.items():
            one = self.requests[name]
            for index, feature in enumerate(one.mm_features):
                place, is_known = feature.mm_position, feature.identifier in self.encoder_cache_manager.cached
                if one.num_computed_tokens <= place.offset < one.num_computed_tokens + count and not is_known:
                    self.encoder_cache_manager.cached[feature.identifier] = {name}
                    if "pixel_values" in feature.data:
                        inputs.setdefault(name, []).append(index)
            one.num_computed_tokens += count
        step = SimpleNamespace(
            total_num_scheduled_tokens=sum(tokens.values()),
            num_scheduled_tokens=tokens,
            scheduled_spec_decode_tokens={name: [0] * count for name, count in (drafts or {}).items()},
            scheduled_encoder_inputs=inputs,
        )
        self.work.begin(step)
        return step

    def step(self, seconds: float, drafts: dict[str, int] | None = None, /, **tokens: int) -> None:
        planned = self.plan(drafts, **tokens)
        self.clock.now += seconds
        self.work.end(planned)

    @property
    def seconds(self) -> float:
        return self.work.load().outstanding_seconds

    def tell(self, **finished: bool) -> dict[str, float]:
        """Hand out an output for each of these requests; return the cost of its prompt for those that it is told of."""
        outputs = [
            SimpleNamespace(request_id=name, finished=is_last, ec_transfer_params=None)
            for name, is_last in finished.items()
        ]
        self.work.prompts.tell([SimpleNamespace(outputs=outputs)])
        return {one.request_id: one.ec_transfer_params[PREFILL_WORK] for one in outputs if one.ec_transfer_params}


def test_prompts_that_wait_cost_what_a_token_cost_lately() -> None:
    scheduler = Scheduler(CONSUMER)
    scheduler.add(request(of="first", tokens=100))
    scheduler.add(request(of="second", tokens=50))
    assert scheduler.seconds == 0  # nothing is known yet
    scheduler.step(2.0, first=100)
    assert scheduler.seconds == pytest.approx(50 * 2.0 / 100)
    assert scheduler.work.load().kv_blocks_free == FREE_BLOCKS
    scheduler.step(1.0, second=50)
    assert scheduler.seconds == 0


def test_what_is_computed_of_a_prompt_counts_no_more_and_a_step_counts_until_it_ends() -> None:
    scheduler = Scheduler(CONSUMER)
    scheduler.add(request(of="one", tokens=301))
    scheduler.step(1.0, one=101)
    assert scheduler.seconds == pytest.approx(200 / 101)
    running = scheduler.plan(one=101)
    assert scheduler.seconds == pytest.approx(
        199 / 101
    )  # to tell a chunk from an answer, one of its tokens isn't counted
    scheduler.clock.now += 1.0
    scheduler.work.end(running)
    assert scheduler.seconds == pytest.approx(99 / 101)


def test_a_prompt_counts_while_it_waits_for_an_embedding_and_an_image_that_is_encoded_elsewhere_costs_nothing() -> None:
    scheduler = Scheduler(CONSUMER)
    scheduler.add(request(of="text", tokens=10))
    scheduler.add(request(("a", 2), of="image", tokens=20))
    scheduler.step(1.0, text=10)
    assert scheduler.seconds == pytest.approx(2.0)


def test_answers_cost_nothing_and_teach_nothing() -> None:
    scheduler = Scheduler(CONSUMER)
    scheduler.add(request(of="answer", tokens=10))
    scheduler.add(request(of="waits", tokens=10))
    scheduler.step(1.0, answer=10)
    known = scheduler.seconds
    scheduler.step(100.0, answer=1)
    scheduler.step(100.0, {"answer": 3}, answer=4)  # three tokens of a draft are checked with it
    assert scheduler.seconds == known == pytest.approx(1.0)


def test_an_encoder_counts_rows_of_images_and_no_prompts() -> None:
    scheduler = Scheduler(PRODUCER)
    scheduler.add(request(("a", 2), of="first", tokens=500, pixels=True))
    scheduler.add(request(("b", 2), ("c", 8), of="second", tokens=500, pixels=True))
    scheduler.add(request(("b", 2), of="third", tokens=500, pixels=True))
    scheduler.step(1.0, first=500)
    assert scheduler.work.load() == Load(outstanding_seconds=2.0)  # two images as large as the one that took a second
    running = scheduler.plan(second=500)
    assert scheduler.seconds == pytest.approx(2.0)
    scheduler.clock.now += 2.0
    scheduler.work.end(running)
    assert scheduler.seconds == 0
    assert identifier_of("b") in scheduler.encoder_cache_manager.cached


def test_an_instance_that_does_everything_counts_both() -> None:
    scheduler = Scheduler(None)
    scheduler.add(request(of="text", tokens=10))
    scheduler.add(request(("a", 2), of="image", tokens=20, pixels=True))
    scheduler.step(1.0, text=10)
    assert scheduler.seconds == pytest.approx((20 + ROWS) / 10)


def test_steps_that_overlap_share_the_time() -> None:
    scheduler = Scheduler(CONSUMER)
    scheduler.add(request(of="one", tokens=101))
    scheduler.add(request(of="two", tokens=101))
    scheduler.add(request(of="waits", tokens=100))
    first = scheduler.plan(one=101)
    second = scheduler.plan(two=101)
    scheduler.clock.now += 1.0
    scheduler.work.end(first)
    scheduler.clock.now += 1.0
    scheduler.work.end(second)
    assert scheduler.seconds == pytest.approx(100 / 101)


# ---- what the server tells ---------------------------------------------------------------------------------------------


def with_prompts(*tokens: int) -> Scheduler:
    """Return a scheduler that tells what prompts cost; its requests are called a, b, and so on."""
    scheduler = Scheduler(None)
    scheduler.work.prompts.is_wanted = True
    for name, count in zip("abcdefgh", tokens, strict=False):
        scheduler.add(request(of=name, tokens=count))
    return scheduler


def test_a_prompt_costs_what_its_steps_take_longer_than_decoding_whatever_runs_beside_it() -> None:
    scheduler = with_prompts(101, 101, 101)
    scheduler.step(1.0, a=101)
    assert scheduler.tell(a=False) == {"a": pytest.approx(1.0)}
    scheduler.step(0.25, a=1)
    scheduler.step(1.25, a=1, b=101)
    assert scheduler.tell(a=False, b=False) == {"b": pytest.approx(1.0)}
    scheduler.step(0.75, a=1, b=1, c=50)
    assert scheduler.tell(a=False, b=False) == {}
    scheduler.step(0.75, a=1, b=1, c=51)
    assert scheduler.tell(a=False, b=False, c=False) == {"c": pytest.approx(1.0)}


def test_prompts_of_one_step_share_its_cost_by_their_rows() -> None:
    scheduler = with_prompts(100, 300)
    scheduler.step(4.0, a=100, b=300)
    assert scheduler.tell(a=False, b=False) == {"a": pytest.approx(1.0), "b": pytest.approx(3.0)}


def test_the_cost_of_a_prompt_is_told_with_the_first_output_and_with_the_last() -> None:
    scheduler = with_prompts(100)
    scheduler.step(1.0, a=100)
    assert [scheduler.tell(a=is_last) for is_last in (False, False, True, True)] == [{"a": 1.0}, {}, {"a": 1.0}, {}]


def test_a_prompt_that_is_computed_again_after_its_first_token_costs_no_more() -> None:
    scheduler = with_prompts(100)
    scheduler.step(1.0, a=100)
    scheduler.requests["a"].num_computed_tokens = 0  # it was preempted
    scheduler.step(5.0, a=100)
    assert scheduler.tell(a=True) == {"a": 1.0}


def test_the_slow_steps_of_a_busy_machine_hardly_change_what_decoding_takes() -> None:
    scheduler = with_prompts(1000, 101)
    scheduler.step(1.0, a=1000)
    for seconds in (0.25, 20.0, 0.3, 0.25, 0.5):
        scheduler.step(seconds, a=1)
    scheduler.step(1.25, a=1, b=101)
    assert scheduler.tell(b=False) == {"b": pytest.approx(1.0, rel=0.05)}


def test_nothing_of_prompts_is_kept_until_it_is_asked_for_nor_of_requests_that_are_gone() -> None:
    scheduler = Scheduler(None)
    prompts = scheduler.work.prompts
    scheduler.add(request(of="first", tokens=100))
    scheduler.step(1.0, first=100)
    assert scheduler.tell(first=True) == {}
    prompts.is_wanted = True
    for number in range(1000):
        name = f"r{number}"
        scheduler.requests.clear()
        scheduler.add(request(of=name, tokens=100))
        scheduler.step(1.0, **{name: 100 - number % 2})  # half of them leave before their first token
    assert len(prompts._begun) + len(prompts._computed) + len(prompts._untold) < 200
    assert scheduler.tell(r999=False) == {}


class Engines:
    """vLLM's client of its engines, which answer when the test lets them."""

    def __init__(self, *loads: Load) -> None:
        self.loads = loads
        self.error: Exception | None = None
        self.questions = 0
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.state = SimpleNamespace(engine_client=SimpleNamespace(engine_core=self, errored=False))

    async def call_utility_all_async(self, method: str) -> list[str]:
        assert method == LOAD_METHOD
        self.questions += 1
        if self.error is not None:
            raise self.error
        await self.may_answer.wait()
        return [msgspec.json.encode(load).decode() for load in self.loads]


async def test_the_load_of_an_instance_is_that_of_all_its_engines() -> None:
    engines = Engines(Load(outstanding_seconds=2.0, kv_blocks_free=3), Load(outstanding_seconds=1.0, kv_blocks_free=4))
    told = ToldLoad(Clock())
    assert told.last() == Load()
    await told.ask(engines.state)
    assert told.last() == Load(outstanding_seconds=3.0, kv_blocks_free=7)


async def test_what_was_told_gets_less_as_time_passes() -> None:
    clock = Clock()
    told = ToldLoad(clock)
    await told.ask(Engines(Load(outstanding_seconds=2.0)).state)
    clock.now += 1.5
    assert told.last().outstanding_seconds == 0.5
    clock.now += 1.5
    assert told.last().outstanding_seconds == 0


async def test_an_engine_in_a_long_step_is_asked_once_and_its_answer_counts_when_it_comes() -> None:
    engines = Engines(Load(outstanding_seconds=2.0))
    engines.may_answer.clear()
    told = ToldLoad(Clock())
    await told.ask(engines.state)
    await told.ask(engines.state)
    assert (engines.questions, told.last()) == (1, Load())
    engines.may_answer.set()
    await told.ask(engines.state)
    assert (engines.questions, told.last()) == (1, Load(outstanding_seconds=2.0))
    await told.ask(engines.state)
    assert engines.questions == 2


async def test_engines_that_do_not_count_are_asked_once_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    engines = Engines()
    engines.error = RuntimeError("no such method")
    told = ToldLoad(Clock())
    await told.ask(engines.state)
    await told.ask(engines.state)
    assert (engines.questions, told.last()) == (1, Load())
    assert "VLLM_PLUGINS" in caplog.text
