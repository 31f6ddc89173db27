"""What the server relies on in engines: the same cases against real ones and against the fakes that other tests use."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from chiasm.ec_transfer import ECTransferConfig, ECTransferRole
from chiasm.engine.config import EngineConfig
from chiasm.engine.encoder import EncoderEngine
from chiasm.engine.engine import LanguageEngine
from chiasm.engine.request import EncodeItem, GenerateRequest, ItemOutcome, Output, SamplingParams
from chiasm.errors import ChiasmError, DeadlineExceededError
from chiasm.kv_transfer import KVTransferConfig
from chiasm.server.context import EncodingEngine, GeneratingEngine
from chiasm.wire import KVTransferParams, Role
from tests.server.fake_engine import FakeEncoderEngine, FakeLanguageEngine
from tests.server.images import png

LANGUAGE_ROLES = [Role.PD, Role.AGGREGATED, Role.PREFILL, Role.DECODE]
CONTINUES = KVTransferParams(do_remote_decode=True, continues=True)
AS_VLLM = KVTransferParams(do_remote_decode=True)
_numbers = itertools.count()


@dataclass(frozen=True)
class Engines:
    """Engines of all roles, which share a store."""

    language: dict[Role, LanguageEngine] | dict[Role, FakeLanguageEngine]
    encoder: EncoderEngine | FakeEncoderEngine


def real_language_engine(model: Path, store: Path, role: Role) -> LanguageEngine:
    ec = ECTransferConfig(role=ECTransferRole.CONSUMER, connector_extra_config={"shared_storage_path": store})
    kv = KVTransferConfig() if role in (Role.PREFILL, Role.DECODE) else None
    engine = LanguageEngine(
        EngineConfig(
            model,
            role,
            dtype="float32",
            threads=1,
            kv_cache_bytes=8 << 20,
            ec=ec if role in (Role.PD, Role.PREFILL) else None,
            kv=kv,
        )
    )
    engine.start()
    return engine


@pytest.fixture(scope="module", params=["fake", "real"])
def engines(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    if request.param == "fake":
        yield Engines({role: FakeLanguageEngine(role) for role in LANGUAGE_ROLES}, FakeEncoderEngine())
        return
    store = tmp_path_factory.mktemp("store")
    ec = ECTransferConfig(role=ECTransferRole.PRODUCER, connector_extra_config={"shared_storage_path": store})
    with ExitStack() as stack:
        encoder = EncoderEngine(EngineConfig(model, Role.ENCODER, dtype="float32", threads=1, ec=ec))
        encoder.start()
        stack.callback(encoder.stop)
        language: dict[Role, LanguageEngine] = {}
        for role in LANGUAGE_ROLES:
            language[role] = real_language_engine(model, store, role)
            stack.callback(language[role].stop)
        yield Engines(language, encoder)


def request_to(
    engine: GeneratingEngine,
    *,
    choices: int = 1,
    seconds: float = 60,
    kv: KVTransferParams | None = None,
    **sampling: Any,
) -> GenerateRequest:
    return GenerateRequest(
        request_id=f"contract-{next(_numbers)}",
        prompt=engine.processor.build_text("Say it"),
        sampling=SamplingParams(**({"temperature": 0, "max_tokens": 3, "ignore_eos": True} | sampling)),
        deadline=time.monotonic() + seconds,
        num_choices=choices,
        kv_transfer_params=kv,
    )


async def outputs_of(engine: GeneratingEngine, request: GenerateRequest) -> list[Output]:
    return [output async for output in engine.generate(request)]


def token_ids_of(outputs: list[Output]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]


# ---- one answer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choices", [1, 3])
async def test_each_choice_ends_once_after_its_tokens(engines: Engines, choices: int) -> None:
    engine = engines.language[Role.PD]
    outputs = await outputs_of(engine, request_to(engine, choices=choices))
    for index in range(choices):
        of_choice = [output for output in outputs if output.index == index]
        assert len(token_ids_of(of_choice)) == 3
        assert [output.finish_reason for output in of_choice[:-1]] == [None] * (len(of_choice) - 1)
        assert (of_choice[-1].finish_reason, of_choice[-1].stop_reason) == ("length", None)
    assert all(output.kv_transfer_params is None and not output.already_sent for output in outputs)


async def test_text_is_that_of_the_tokens(engines: Engines) -> None:
    engine = engines.language[Role.PD]
    outputs = await outputs_of(engine, request_to(engine))
    assert "".join(output.text for output in outputs) == engine.processor.tokenizer.decode(token_ids_of(outputs))


async def test_log_probabilities_come_with_their_tokens_if_asked_for(engines: Engines) -> None:
    engine = engines.language[Role.PD]
    assert all(output.logprobs is None for output in await outputs_of(engine, request_to(engine)))
    for output in await outputs_of(engine, request_to(engine, logprobs=2)):
        assert output.logprobs is not None
        assert tuple(entry.token_id for entry in output.logprobs) == output.token_ids
        assert all(len(entry.top) == 2 and entry.logprob <= 0 for entry in output.logprobs)


async def test_timing_is_known_with_the_first_token(engines: Engines) -> None:
    engine = engines.language[Role.PD]
    first = (await outputs_of(engine, request_to(engine)))[0]
    assert first.timing.queue_seconds is not None
    assert first.timing.prefill_seconds is not None
    assert first.timing.first_token_seconds is not None
    assert first.timing.items == []
    assert first.num_cached_tokens >= 0


async def test_an_answer_of_several_tokens_tells_what_a_step_takes(engines: Engines) -> None:
    engine = engines.language[Role.PD]
    last = (await outputs_of(engine, request_to(engine)))[-1]
    assert last.timing.step_seconds is not None
    assert last.timing.step_seconds > 0


async def test_an_answer_that_is_closed_leaves_the_engine_to_others(engines: Engines) -> None:
    engine = engines.language[Role.PD]
    outputs = engine.generate(request_to(engine, max_tokens=1000))
    assert isinstance(outputs, AsyncGenerator)
    async with aclosing(outputs):
        await anext(outputs)
    assert len(token_ids_of(await outputs_of(engine, request_to(engine)))) == 3


async def test_a_deadline_that_has_passed_is_an_error(engines: Engines) -> None:
    engine = engines.language[Role.PD]
    with pytest.raises(DeadlineExceededError):
        await outputs_of(engine, request_to(engine, seconds=-1, max_tokens=1000))


@pytest.mark.parametrize("kind", ["fake", "real"])
async def test_an_engine_that_has_stopped_refuses(kind: str, model: Path, tmp_path: Path) -> None:
    engine = FakeLanguageEngine(Role.PD) if kind == "fake" else real_language_engine(model, tmp_path, Role.PD)
    assert engine.healthy
    engine.stop()
    assert not engine.healthy
    with pytest.raises(ChiasmError):
        await outputs_of(engine, request_to(engine))


# ---- answers in two parts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [CONTINUES, AS_VLLM], ids=["continues", "as vLLM"])
async def test_prefill_ends_after_a_token_with_a_handle(engines: Engines, params: KVTransferParams) -> None:
    engine = engines.language[Role.PREFILL]
    request = request_to(engine, kv=params, logprobs=1, seed=7)
    outputs = await outputs_of(engine, request)
    assert [output.kv_transfer_params is None for output in outputs] == [True] * (len(outputs) - 1) + [False]
    assert outputs[-1].finish_reason == "length"
    handle = outputs[-1].kv_transfer_params
    assert handle is not None
    assert handle.do_remote_prefill
    assert not handle.do_remote_decode
    assert handle.remote_engine_id
    assert handle.remote_block_ids
    assert handle.remote_host
    assert handle.remote_port
    assert handle.remote_request_id
    assert handle.digest
    assert handle.continues is params.continues
    assert handle.num_tokens == len(request.prompt.token_ids)
    assert handle.output_token_ids == token_ids_of(outputs)
    assert len(handle.output_token_ids) == len(handle.output_logprobs) == 1
    assert len(handle.output_logprobs[0].top) == 1
    assert (handle.seed, handle.num_sent, handle.created) == (7, 0, None)


async def test_prefill_draws_a_seed_for_decode(engines: Engines) -> None:
    engine = engines.language[Role.PREFILL]
    handle = (await outputs_of(engine, request_to(engine, kv=CONTINUES)))[-1].kv_transfer_params
    assert handle is not None
    assert handle.seed is not None


@pytest.mark.parametrize(("params", "has_handle"), [(CONTINUES, False), (AS_VLLM, True)], ids=["continues", "as vLLM"])
async def test_an_answer_of_one_token_has_a_handle_for_vllms_proxies_alone(
    engines: Engines, params: KVTransferParams, has_handle: bool
) -> None:
    engine = engines.language[Role.PREFILL]
    last = (await outputs_of(engine, request_to(engine, kv=params, max_tokens=1)))[-1]
    assert last.finish_reason == "length"
    assert (last.kv_transfer_params is not None) == has_handle


@pytest.mark.parametrize("num_sent", [0, 1])
async def test_decode_continues_with_all_tokens_and_marks_those_that_were_sent(engines: Engines, num_sent: int) -> None:
    prefill, decode = engines.language[Role.PREFILL], engines.language[Role.DECODE]
    whole = await outputs_of(engines.language[Role.PD], request_to(engines.language[Role.PD]))
    handle = (await outputs_of(prefill, request_to(prefill, kv=CONTINUES)))[-1].kv_transfer_params
    assert handle is not None
    outputs = await outputs_of(decode, request_to(decode, kv=replace(handle, num_sent=num_sent)))
    assert token_ids_of(outputs) == token_ids_of(whole)
    assert token_ids_of([output for output in outputs if output.already_sent]) == handle.output_token_ids[:num_sent]
    assert (outputs[-1].finish_reason, outputs[-1].kv_transfer_params) == ("length", None)
    assert outputs[-1].timing.kv_seconds is not None


async def test_decode_samples_several_choices_from_the_prompt_alone(engines: Engines) -> None:
    prefill, decode = engines.language[Role.PREFILL], engines.language[Role.DECODE]
    handle = (await outputs_of(prefill, request_to(prefill, kv=AS_VLLM, max_tokens=1)))[-1].kv_transfer_params
    assert handle is not None
    prompt_only = replace(handle, output_token_ids=[], output_logprobs=[])
    outputs = await outputs_of(decode, request_to(decode, kv=prompt_only, choices=2))
    assert [len(token_ids_of([output for output in outputs if output.index == index])) for index in (0, 1)] == [3, 3]


async def test_an_answer_that_is_prefilled_again_begins_with_what_it_has(engines: Engines) -> None:
    engine = engines.language[Role.PREFILL]
    first = (await outputs_of(engine, request_to(engine, kv=CONTINUES)))[-1].kv_transfer_params
    assert first is not None
    again = replace(CONTINUES, output_token_ids=first.output_token_ids, num_sent=1, seed=first.seed)
    outputs = await outputs_of(engine, request_to(engine, kv=again))
    assert [output.already_sent for output in outputs] == [True, False]
    handle = outputs[-1].kv_transfer_params
    assert handle is not None
    assert handle.output_token_ids == token_ids_of(outputs)
    assert len(handle.output_token_ids) == 2


# ---- encoder -----------------------------------------------------------------------------------------------------------


async def test_an_encoder_answers_in_order_with_metadata_that_sizes_placeholders(engines: Engines) -> None:
    images = {"a" * 64: png(64, 48, "red"), "b" * 64: png(64, 48, "blue")}
    items = [EncodeItem(name, data, height=48, width=64) for name, data in images.items()]
    encoded = await engines.encoder.encode("contract", items, time.monotonic() + 60)
    assert [item.identifier for item in encoded] == list(images)
    for item in encoded:
        assert item.outcome in (ItemOutcome.ENCODED, ItemOutcome.HIT)
        assert engines.encoder.processor.geometry_of_metadata(item.metadata).metadata == item.metadata
        assert min(item.queue_seconds, item.preprocess_seconds, item.encode_seconds, item.publish_seconds) >= 0


# ---- what an engine says about itself ----------------------------------------------------------------------------------


@pytest.mark.parametrize("role", LANGUAGE_ROLES)
def test_a_language_engine_describes_itself(engines: Engines, role: Role) -> None:
    engine = engines.language[role]
    assert isinstance(engine, GeneratingEngine)
    assert not isinstance(engine, EncodingEngine)
    assert (engine.config.role, engine.healthy, str(engine.device), engine.dtype_name) == (role, True, "cpu", "float32")
    assert 0 < engine.max_model_len <= engine.processor.max_model_len
    assert int(engine.model_fingerprint, 16)
    assert engine.num_threads >= 1
    assert bool(engine.store_id()) == (role in (Role.PD, Role.PREFILL))
    stats = engine.stats()
    assert 0 <= stats.kv_blocks_used <= stats.kv_blocks_total
    assert (stats.ec is not None) == (role in (Role.PD, Role.PREFILL))
    assert (stats.kv is not None) == (role in (Role.PREFILL, Role.DECODE))


def test_an_encoder_engine_describes_itself(engines: Engines) -> None:
    engine = engines.encoder
    assert isinstance(engine, EncodingEngine)
    assert not isinstance(engine, GeneratingEngine)
    assert (engine.config.role, engine.healthy, engine.config.kv) == (Role.ENCODER, True, None)
    assert engine.store_id()
    assert engine.stats().ec is not None
