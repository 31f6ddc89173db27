"""Images that cost more than they look: an encoder refuses them, and answers good ones beside them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from chiasm.bench import synthetic
from chiasm.ec_transfer import ECTransferConfig, ECTransferRole
from chiasm.engine import EngineConfig
from chiasm.engine.encoder import EncoderEngine
from chiasm.engine.request import EncodedItem, EncodeItem, ItemOutcome
from chiasm.errors import MediaError
from chiasm.media import MediaConfig, identifier, inspect
from chiasm.wire import Role
from tests.media import hostile


@pytest.fixture
def encoder(tmp_path: Path) -> Iterator[EncoderEngine]:
    ec = ECTransferConfig(
        role=ECTransferRole.PRODUCER, connector_extra_config={"shared_storage_path": tmp_path / "store"}
    )
    checkpoint = synthetic.make("qwen3_vl", tmp_path / "checkpoint")
    media = MediaConfig(decode_cpu_seconds=0.5)
    engine = EncoderEngine(EngineConfig(checkpoint, Role.ENCODER, ec=ec, threads=1, media=media))
    engine.start()
    yield engine
    engine.stop()


async def encode(encoder: EncoderEngine, data: bytes) -> EncodedItem:
    info = inspect(data)
    name = identifier(data, fingerprint=encoder.model_fingerprint)
    (item,) = await encoder.encode(name, [EncodeItem(name, data, info.height, info.width)], time.monotonic() + 60)
    return item


async def test_a_good_image_is_encoded_beside_images_that_decode_without_end(encoder: EncoderEngine) -> None:
    tail = hostile.chunk(b"abCd") * 2_500_000  # far more than the limit allows on any machine
    hostile_files = [hostile.png(tail=tail, side=side) for side in (60, 61, 62)]
    attacks = [asyncio.ensure_future(encode(encoder, data)) for data in hostile_files]
    good = await encode(encoder, hostile.encode("PNG"))
    assert good.outcome is ItemOutcome.ENCODED
    for refused in await asyncio.gather(*attacks, return_exceptions=True):
        assert isinstance(refused, MediaError)
        assert refused.code == "image_too_expensive"
    assert encoder.healthy
    assert (await encode(encoder, hostile.encode("TIFF"))).outcome is ItemOutcome.ENCODED
