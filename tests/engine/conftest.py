"""A small random checkpoint, and engines of all roles that serve it."""

from __future__ import annotations

import asyncio
import io
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from chiasm.bench import synthetic
from chiasm.ec_transfer import ECTransferConfig, ECTransferRole
from chiasm.engine import EngineConfig
from chiasm.engine.encoder import EncoderEngine
from chiasm.engine.engine import LanguageEngine
from chiasm.engine.request import EncodedItem, EncodeItem, GenerateRequest, Output, SamplingParams
from chiasm.kv_transfer import KVConnectorStats, KVTransferConfig
from chiasm.media import identifier
from chiasm.models.base import ItemGeometry, Pixels, Prompt, VisionModel
from chiasm.wire import KVTransferParams, Role, TokenLogprob

_numbers = itertools.count()


@dataclass(frozen=True)
class ImageFile:
    """A file with an image of random pixels."""

    data: bytes
    height: int
    width: int

    @property
    def image(self) -> Image.Image:
        return Image.open(io.BytesIO(self.data)).convert("RGB")


def sample_image(seed: int, height: int = 96, width: int = 96) -> ImageFile:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 255, (height, width, 3), generator=generator, dtype=torch.uint8).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return ImageFile(file.getvalue(), height, width)


A, B = sample_image(1), sample_image(2, height=128, width=64)
Parts = tuple[str | ImageFile, ...]


def entries(store: Path) -> list[Path]:
    """Return the files of the embeddings in the store."""
    return sorted(store.rglob("*.safetensors"))


async def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until ``condition()`` holds."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - the engine's state has no event
            await asyncio.sleep(0.002)


@dataclass(frozen=True)
class Answer:
    """Everything that came for one choice."""

    token_ids: list[int]
    text: str
    outputs: list[Output]

    @property
    def last(self) -> Output:
        return self.outputs[-1]

    @property
    def handle(self) -> KVTransferParams:
        """The handle with which the answer continues on a decode engine."""
        assert self.last.kv_transfer_params is not None
        return self.last.kv_transfer_params

    @property
    def logprobs(self) -> list[TokenLogprob]:
        return [token for output in self.outputs for token in output.logprobs or ()]


class Instance:
    """A language engine, and the requests that a test sends to it."""

    def __init__(self, engine: LanguageEngine) -> None:
        self.engine = engine

    def prompt(self, *parts: str | ImageFile) -> Prompt:
        """Return the prompt for a chat message of texts and images."""
        content: list[dict[str, str]] = []
        items: list[tuple[str, ItemGeometry]] = []
        for part in parts:
            if isinstance(part, ImageFile):
                content.append({"type": "image"})
                name = identifier(part.data, fingerprint=self.engine.model_fingerprint)
                items.append((name, self.engine.processor.geometry_of_size(part.height, part.width)))
            else:
                content.append({"type": "text", "text": part})
        return self.engine.processor.build_chat([{"role": "user", "content": content}], items)

    def request(
        self,
        *parts: str | ImageFile,
        seconds: float = 60,
        choices: int = 1,
        salt: str = "",
        kv: KVTransferParams | None = None,
        **params: Any,
    ) -> GenerateRequest:
        params = {"temperature": 0, "max_tokens": 8, "ignore_eos": True} | params
        pixels: dict[str, Pixels] = {}
        if self.engine.config.role is Role.AGGREGATED:
            for part in parts:
                if isinstance(part, ImageFile):
                    name = identifier(part.data, fingerprint=self.engine.model_fingerprint)
                    pixels[name] = self.engine.processor.preprocess(part.image)
        return GenerateRequest(
            request_id=f"request-{next(_numbers)}",
            prompt=self.prompt(*parts),
            sampling=SamplingParams(**params),
            deadline=time.monotonic() + seconds,
            num_choices=choices,
            pixels=pixels,
            cache_salt=salt,
            kv_transfer_params=kv,
        )

    async def ask(self, *parts: str | ImageFile, **options: Any) -> Answer:
        return (await self.choices(*parts, **options))[0]

    async def choices(self, *parts: str | ImageFile, **options: Any) -> list[Answer]:
        return await self.send(self.request(*parts, **options))

    async def send(self, request: GenerateRequest) -> list[Answer]:
        answers = [Answer([], "", []) for _ in range(request.num_choices)]
        async for output in self.engine.generate(request):
            answer = answers[output.index]
            answer.token_ids.extend(output.token_ids)
            answer.outputs.append(output)
        return [replace(answer, text="".join(output.text for output in answer.outputs)) for answer in answers]

    def is_empty(self) -> bool:
        stats = self.engine.stats()
        return stats.num_running == stats.num_waiting == stats.kv_blocks_used == 0

    def kv_stats(self) -> KVConnectorStats:
        stats = self.engine.stats().kv
        assert stats is not None
        return stats

    @property
    def bytes_per_block(self) -> int:
        return self.engine._runner.kv_cache.blocks.shape[1]


def vision_of(instance: Instance) -> VisionModel:
    """Return the vision encoder of an aggregated engine."""
    encoder = instance.engine._embeddings._encoder
    assert encoder is not None
    return encoder._vision


class Encoder:
    """An encoder engine, and the images that a test sends to it."""

    def __init__(self, engine: EncoderEngine) -> None:
        self.engine = engine

    async def encode(self, *images: ImageFile) -> list[EncodedItem]:
        items = [
            EncodeItem(
                identifier(each.data, fingerprint=self.engine.model_fingerprint), each.data, each.height, each.width
            )
            for each in images
        ]
        return await self.engine.encode("test", items, time.monotonic() + 60)


Start = Callable[..., Instance]
StartEncoder = Callable[..., Encoder]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.make("qwen3_vl", tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def start(checkpoint: Path, store: Path) -> Iterator[Start]:
    """Start language engines of a role; they end with the test."""
    engines: list[LanguageEngine] = []

    def start(role: Role = Role.PD, *, kv: dict[str, Any] | None = None, **config: Any) -> Instance:
        consumes = role in (Role.PD, Role.PREFILL)
        config = {
            "ec": ECTransferConfig(role=ECTransferRole.CONSUMER, connector_extra_config={"shared_storage_path": store})
            if consumes
            else None,
            "kv": KVTransferConfig(**(kv or {})) if role in (Role.PREFILL, Role.DECODE) else None,
            "dtype": "float32",  # on every CPU, since answers are compared token for token
            "threads": 1,
            "kv_cache_bytes": 8 << 20,
        } | config
        engine = LanguageEngine(EngineConfig(checkpoint, role, **config))
        engines.append(engine)
        engine.start()
        return Instance(engine)

    yield start
    for engine in engines:
        engine.stop()


@pytest.fixture
def encoders(checkpoint: Path, store: Path) -> Iterator[StartEncoder]:
    """Start encoder engines; they end with the test."""
    engines: list[EncoderEngine] = []

    def start(*, max_bytes: int = ECTransferConfig.max_bytes, cache: str = "", **config: Any) -> Encoder:
        ec = ECTransferConfig(
            role=ECTransferRole.PRODUCER,
            connector_extra_config={"shared_storage_path": store},
            max_bytes=max_bytes,
            store=cache,
        )
        chosen: dict[str, Any] = {"dtype": "float32", "threads": 1} | config
        engine = EncoderEngine(EngineConfig(checkpoint, Role.ENCODER, ec=ec, **chosen))
        engines.append(engine)
        engine.start()
        return Encoder(engine)

    yield start
    for engine in engines:
        engine.stop()


@pytest.fixture
def encoder(encoders: StartEncoder) -> Encoder:
    return encoders()
