"""Engines that answer what a test tells them, so that tests of the protocol need no model.

They are the only test doubles here, and stand for the engines of all roles: a processor that makes a token of every byte, and
an answer that a test can script. As a prefill instance the fake ends after one letter of the answer, with a handle; as a
decode instance it continues from what comes with a handle. test_engine_contract.py holds them to the real engines.
"""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from chiasm.ec_transfer import ECConnectorStats
from chiasm.ec_transfer.losses import LossWatch
from chiasm.engine.base import Engine
from chiasm.engine.config import EngineConfig
from chiasm.engine.request import (
    EncodedItem,
    EncodeItem,
    EngineStats,
    FinishReason,
    GenerateRequest,
    ItemOutcome,
    ItemTiming,
    Output,
    RequestTiming,
)
from chiasm.errors import ChiasmError, DeadlineExceededError, InvalidRequestError
from chiasm.kv_transfer import KVConnectorStats, KVTransferConfig
from chiasm.models.base import ItemGeometry, Message, Metadata, Pixels, Processor, Prompt, PromptItem
from chiasm.models.tool_format import HERMES
from chiasm.wire import Costs, ECPlace, KVTransferParams, Role, TokenLogprob

PLACEHOLDER = "\x01"
FINGERPRINT = "f1" * 16
ANSWER = "Hello"
SEED = 99
"""The seed of requests without one."""
_WITHOUT_STORE = (Role.AGGREGATED, Role.DECODE)
Script = Callable[[GenerateRequest], AsyncIterator[Output]]


class ByteProcessor(Processor):
    """Makes a token of each byte; a chat is the text of its messages, and an image has a token for each 28 x 28 pixels."""

    def __init__(self) -> None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        self.tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
        self.tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self.tokenizer.decoder = decoders.ByteLevel()
        self.tokenizer.add_special_tokens(["<end>"])
        self.eos_token_ids = frozenset({256})
        self.placeholder = PLACEHOLDER
        self.vocab_size = 257
        self.max_model_len = 512
        self.tool_format = HERMES
        self.default_sampling = {"temperature": 0.5, "top_k": 7}
        self.rendered: list[tuple[list[Message], dict[str, Any]]] = []
        self.texts: list[tuple[str, bool]] = []
        """Plain prompts, and whether they got special tokens of the tokenizer's."""

    def build_chat(
        self,
        messages: Sequence[Message],
        items: Sequence[tuple[str, ItemGeometry]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> Prompt:
        self.rendered.append(
            (
                list(messages),
                {
                    "add_generation_prompt": add_generation_prompt,
                    "continue_final_message": continue_final_message,
                    "template_kwargs": template_kwargs,
                    "tools": list(tools),
                },
            )
        )
        token_ids: list[int] = []
        placed: list[PromptItem] = []
        left = list(items)
        for message in messages:
            content = message["content"]
            for part in content if isinstance(content, list) else [{"type": "text", "text": content}]:
                if part["type"] == "text":
                    token_ids += self.tokenizer.encode(part["text"]).ids
                else:
                    name, geometry = left.pop(0)
                    placed.append(PromptItem(name, len(token_ids), len(geometry.token_ids), geometry))
                    token_ids += geometry.token_ids
        return Prompt(token_ids, placed)

    def build_text(self, text: str, *, add_special_tokens: bool = True) -> Prompt:
        if PLACEHOLDER in text:
            raise InvalidRequestError("the prompt holds a placeholder", param="prompt")
        self.texts.append((text, add_special_tokens))
        return Prompt(self.tokenizer.encode(text).ids)

    def build_tokens(self, token_ids: Sequence[int]) -> Prompt:
        if any(not 0 <= token_id < self.vocab_size for token_id in token_ids):
            raise InvalidRequestError("a token is not in the vocabulary", param="prompt")
        return Prompt(list(token_ids))

    def geometry_of_size(self, height: int, width: int) -> ItemGeometry:
        if not (1 <= height <= 4096 and 1 <= width <= 4096):
            raise InvalidRequestError("an image needs a size")
        rows = -(-height // 28) * -(-width // 28)
        metadata = {"image_grid_thw": [1, -(-height // 28), -(-width // 28)]}
        return ItemGeometry((0,) * rows, tuple(range(rows)), metadata)

    def geometry_of_metadata(self, metadata: Metadata) -> ItemGeometry:
        match metadata:
            case {"image_size": [int(height), int(width)]}:
                return self.geometry_of_size(height, width)
            case {"image_grid_thw": [1, int(height), int(width)]}:
                return self.geometry_of_size(28 * height, 28 * width)
        raise InvalidRequestError("unknown metadata")

    def preprocess(self, image: Any) -> Pixels:
        return Pixels({}, self.geometry_of_size(image.height, image.width))


class FakeEngine(Engine):
    """What the fakes of all roles have in common."""

    processor: ByteProcessor
    healthy = True

    def __init__(self, role: Role, *, max_items: int = EngineConfig.max_items) -> None:
        # Not the base class's: it loads a processor from a checkpoint.
        kv = KVTransferConfig() if role in (Role.PREFILL, Role.DECODE) else None
        self.config = EngineConfig(Path("/nowhere/bytes"), role, kv=kv, max_items=max_items, threads=2)
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self.processor = ByteProcessor()
        self.model_fingerprint = FINGERPRINT
        self.max_model_len = self.processor.max_model_len
        self.device_id = "host/cpu:0,1"
        self.costs = Costs(prefill_seconds_per_token=0.001, decode_step_seconds=0.01)
        self._ec_connector = "" if role in _WITHOUT_STORE else "SharedStorageConnector"
        self._ec_halves = ()
        self._ec_place = ECPlace(host="e.example", port=7002, engine_id="engine-e") if role is Role.ENCODER else None
        self.reset()

    def reset(self) -> None:
        """Undo what tests have changed."""
        self.healthy = True
        self.store_error: Exception | None = None
        self.processor.rendered.clear()
        self.processor.texts.clear()
        self.started: queue.SimpleQueue[str] = queue.SimpleQueue()
        """Ids of requests that began."""
        self.aborted: queue.SimpleQueue[str] = queue.SimpleQueue()
        """Ids of requests that were closed before they ended."""

    def start(self) -> None:
        pass

    def stop(self) -> None:
        self.healthy = False

    def store_id(self) -> str:
        if self.store_error is not None:
            raise self.store_error
        return "" if self.config.role in _WITHOUT_STORE else "store-1"

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=2,
            items={ItemOutcome.HIT: 3},
            generation_tokens=11,
            kv_blocks_total=8,
            kv_blocks_used=3,
            ec=None if self.config.role in _WITHOUT_STORE else ECConnectorStats(loads=4),
            kv=None if self.config.kv is None else KVConnectorStats(transfers=5, transferred_bytes=640, leases_held=1),
        )


class FakeLanguageEngine(FakeEngine):
    """Answers ``Hello`` to everything, until ``script`` says otherwise."""

    def __init__(self, role: Role, *, max_items: int = EngineConfig.max_items) -> None:
        super().__init__(role, max_items=max_items)
        self._scripts: dict[Role, Script] = {Role.PREFILL: self.prefill, Role.DECODE: self._decode}

    def reset(self) -> None:
        super().reset()
        self.script: Script | None = None
        self.requests: list[GenerateRequest] = []
        self.awaited: list[str] = []
        self.losses = LossWatch(lambda names: [name for name in names if name in self.awaited])
        """Who waits to be told what is lost; ``note_missing`` says what is wanted."""
        self.expected: queue.SimpleQueue[tuple[dict[str, ECPlace], list[str]]] = queue.SimpleQueue()
        """What it was told about embeddings: where they are or will be, and which are stored."""
        self.given_back: queue.SimpleQueue[str] = queue.SimpleQueue()
        """Leases of KV that nobody will come for."""

    async def awaited_embeddings(self) -> list[str]:
        return self.awaited

    async def lost_embeddings(self, asker: str, published: Collection[str]) -> list[str]:
        return await asyncio.wrap_future(self.losses.ask(asker, published))

    def expect_embeddings(self, places: Mapping[str, ECPlace], stored: Collection[str]) -> None:
        self.expected.put((dict(places), list(stored)))

    def give_back_kv(self, leases: Collection[str]) -> None:
        for lease in leases:
            self.given_back.put(lease)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Output, None]:
        if not self.healthy:
            raise ChiasmError("The engine has stopped.")
        self.requests.append(request)
        self.started.put(request.request_id)
        if request.deadline <= time.monotonic():
            raise DeadlineExceededError("The deadline has passed.")
        ended = False
        try:
            async for output in (self.script or self._scripts.get(self.config.role, self._hello))(request):
                yield output
            ended = True
        finally:
            if not ended:
                self.aborted.put(request.request_id)

    async def _hello(self, request: GenerateRequest) -> AsyncIterator[Output]:
        for place in range(_length(request)):
            for index in range(request.num_choices):
                yield self._letter(request, place, index)

    async def prefill(self, request: GenerateRequest) -> AsyncIterator[Output]:
        params = request.kv_transfer_params
        assert params is not None
        for output in self._given(request):
            yield output
        given = params.output_token_ids
        output = self._letter(request, len(given))
        if params.continues and output.finish_reason is not None:
            yield output
            return
        handle = KVTransferParams(
            do_remote_prefill=True,
            remote_engine_id="engine-p",
            remote_block_ids=[4, 7],
            remote_host="p.example",
            remote_port=7001,
            remote_request_id=request.request_id,
            continues=params.continues,
            num_tokens=len(request.prompt.token_ids) + len(given),
            digest="d1",
            output_token_ids=[*given, *output.token_ids],
            output_logprobs=[*params.output_logprobs, *(output.logprobs or ())],
            seed=SEED if request.sampling.seed is None else request.sampling.seed,
            cached_tokens=1,
        )
        yield replace(output, finish_reason=output.finish_reason or "length", kv_transfer_params=handle)

    async def _decode(self, request: GenerateRequest) -> AsyncIterator[Output]:
        assert request.kv_transfer_params is not None
        for output in self._given(request):
            yield output
        for place in range(len(request.kv_transfer_params.output_token_ids), _length(request)):
            for index in range(request.num_choices):
                yield self._letter(request, place, index)

    def _given(self, request: GenerateRequest) -> Iterator[Output]:
        """Yield the tokens that came with the request: those that the client has, then the others."""
        params = request.kv_transfer_params
        assert params is not None
        text: str = self.processor.tokenizer.decode(params.output_token_ids)
        if params.num_sent:
            yield replace(self.output(request, text[: params.num_sent]), logprobs=None, already_sent=True)
        if text[params.num_sent :]:
            ended = len(text) == _length(request) and not params.do_remote_decode
            yield self.output(request, text[params.num_sent :], finish_reason="length" if ended else None)

    def _letter(self, request: GenerateRequest, place: int, index: int = 0) -> Output:
        """Return one letter of the answer; the last has the finish reason."""
        length = _length(request)
        reason: FinishReason = "stop" if length == len(ANSWER) else "length"
        return self.output(request, ANSWER[place], index=index, finish_reason=reason if place == length - 1 else None)

    def output(
        self,
        request: GenerateRequest,
        text: str,
        *,
        index: int = 0,
        finish_reason: FinishReason | None = None,
        stop_reason: int | str | None = None,
    ) -> Output:
        """Return the output of a step; every token has the log probability -0.5."""
        token_ids = tuple(self.processor.tokenizer.encode(text).ids)
        wanted = request.sampling.logprobs
        top = tuple((token, -0.5 - token) for token in range(wanted or 0))
        return Output(
            index=index,
            token_ids=token_ids,
            text=text,
            logprobs=None if wanted is None else tuple(TokenLogprob(-0.5, top, token) for token in token_ids),
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            timing=RequestTiming(
                queue_seconds=0.001,
                wait_seconds=0.02,
                transfer_seconds=0.003,
                kv_seconds=0.005 if self.config.role is Role.DECODE else None,
                encode_seconds=0.0,
                prefill_seconds=0.004,
                prefill_work_seconds=0.003,
                first_token_seconds=0.028,
                step_seconds=0.006,
                items=[ItemTiming(item.identifier, ItemOutcome.WAITED, 0.02) for item in request.prompt.items],
            ),
            num_cached_tokens=3,
        )


class FakeEncoderEngine(FakeEngine):
    """Publishes nothing, and says that it encoded everything."""

    def __init__(self, *, max_items: int = EngineConfig.max_items) -> None:
        super().__init__(Role.ENCODER, max_items=max_items)

    def reset(self) -> None:
        super().reset()
        self.encode_error: Exception | None = None
        self.encode_blocks = False
        self.encoded: list[list[EncodeItem]] = []

    async def encode(self, request_id: str, items: Sequence[EncodeItem], deadline: float) -> list[EncodedItem]:
        self.encoded.append(list(items))
        self.started.put(request_id)
        if self.encode_blocks:
            try:
                await asyncio.Event().wait()
            finally:
                self.aborted.put(request_id)
        if self.encode_error is not None:
            raise self.encode_error
        metadata = {"image_grid_thw": [1, 2, 3]}
        return [
            EncodedItem(item.identifier, metadata, ItemOutcome.ENCODED, 0.001, 0.002, 0.003, 0.004) for item in items
        ]


def _length(request: GenerateRequest) -> int:
    return min(len(ANSWER), request.sampling.max_tokens)


async def never(request: GenerateRequest) -> AsyncIterator[Output]:
    """Yield no output, for ever."""
    outputs: asyncio.Queue[Output] = asyncio.Queue()
    yield await outputs.get()
