"""What an instance of vLLM measures of its own costs at start; its engine is played, and its times are made up."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from chiasm.integrations.vllm.calibration import measure_costs
from chiasm.wire import Costs

STEP = 0.01
BYTES_PER_TOKEN = 2


@pytest.fixture(autouse=True)
def loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("vllm")
    module.__dict__["SamplingParams"] = SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", module)


@dataclass
class Engine:
    """The client of vLLM's engine: the first prompt of each length takes three times as long as others."""

    token_seconds: float = 1e-4
    fails: bool = False
    prompts: list[dict[str, str]] = field(default_factory=list)

    async def generate(self, prompt: dict[str, str], params: Any, request_id: str) -> AsyncGenerator[Any, None]:
        if self.fails:
            raise RuntimeError("no tokenizer")
        text = prompt["prompt"]
        first = not any(one["prompt"] == text for one in self.prompts)
        self.prompts.append(prompt)
        tokens = len(text) // BYTES_PER_TOKEN
        prefill = tokens * self.token_seconds * (3 if first else 1)
        for number in range(params.max_tokens):
            times = SimpleNamespace(
                scheduled_ts=5.0, first_token_ts=5.0 + prefill, last_token_ts=5.0 + prefill + number * STEP
            )
            yield SimpleNamespace(metrics=times, prompt_token_ids=[0] * tokens)


def state(engine: Engine, *, longest: int = 100_000, step_tokens: int = 2048, kv: str | None = None) -> SimpleNamespace:
    config = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_connector=kv) if kv else None,
        scheduler_config=SimpleNamespace(max_num_batched_tokens=step_tokens),
        model_config=SimpleNamespace(max_model_len=longest),
    )
    return SimpleNamespace(engine_client=engine, vllm_config=config)


async def test_the_costs_of_prefill_and_decode_are_those_of_prompts_that_nothing_slows_down() -> None:
    engine = Engine()
    costs = await measure_costs(state(engine))
    assert costs.prefill_seconds_per_token == pytest.approx(engine.token_seconds)
    assert costs.decode_step_seconds == pytest.approx(STEP)
    assert costs.beside_streams == pytest.approx(1 + STEP / (2048 * engine.token_seconds))


async def test_a_slow_engine_gets_short_prompts_only() -> None:
    engine = Engine(token_seconds=0.01)
    await measure_costs(state(engine))
    assert {len(one["prompt"]) for one in engine.prompts} == {256}


@pytest.mark.parametrize(("longest", "step_tokens"), [(512, 2048), (100_000, 512)])
async def test_no_prompt_can_have_more_tokens_than_a_request_or_a_step(longest: int, step_tokens: int) -> None:
    engine = Engine()
    await measure_costs(state(engine, longest=longest, step_tokens=step_tokens))
    assert [len(one["prompt"]) for one in engine.prompts] == [256, 256, 487, 487]


async def test_no_prompt_finds_another_in_the_prefix_cache() -> None:
    engine = Engine()
    await measure_costs(state(engine))
    salts = [one["cache_salt"] for one in engine.prompts]
    assert len(set(salts)) == len(salts) > 2


@pytest.mark.parametrize(("kv", "is_asked"), [("NixlConnector", True), ("MoRIIOConnector", False)])
async def test_a_connector_for_kv_that_may_need_more_of_a_request_gets_none(kv: str, is_asked: bool) -> None:
    engine = Engine()
    assert (await measure_costs(state(engine, kv=kv)) != Costs()) == is_asked == bool(engine.prompts)


async def test_an_engine_that_refuses_has_no_costs_and_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    assert await measure_costs(state(Engine(fails=True))) == Costs()
    assert "no tokenizer" in caplog.text
