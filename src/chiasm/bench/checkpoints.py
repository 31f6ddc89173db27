"""Random checkpoints whose sizes suit a measurement, each made once per run."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path

from chiasm.bench.measurement import Bench
from chiasm.bench.requests import QUESTION, chat, embeds_part, identifier_of, photo, publish, text_part
from chiasm.bench.statistics import median
from chiasm.bench.synthetic import SyntheticSize
from chiasm.bench.topology import pinned, running
from chiasm.launch import Deployment
from chiasm.wire import Role

TEXT_LAYERS = 3
"""Decoder layers before the decoder is balanced against the encoder."""
_ROUNDS = 5
_ENOUGH_ALIKE = 0.15
_MOST_LAYERS = 32
_ATTEMPTS = 3
SIDE = 512
"""Width and height in pixels of the images by which encode and prefill are balanced."""


def size_of(text_layers: int) -> SyntheticSize:
    """Return a vision tower that turns an image of 512 x 512 pixels into 256 tokens, and a decoder of that many layers.

    The decoder is wide and shallow, so that attention to earlier images is a small part of prefill, as it is in models
    of billions of parameters.
    """
    return SyntheticSize(
        text_hidden=1024,
        text_intermediate=4096,
        text_layers=text_layers,
        text_heads=8,
        text_kv_heads=2,
        head_dim=64,
        vision_hidden=256,
        vision_intermediate=768,
        vision_depth=4,
        vision_heads=4,
        patch_pixels=16,
        max_pixels=512 * 512,
        vocab_size=1024,
        max_position_embeddings=8192,
    )


LONG_PROMPTS = SyntheticSize(
    text_hidden=512,
    text_intermediate=2048,
    text_layers=4,
    text_heads=8,
    text_kv_heads=2,
    head_dim=64,
    vocab_size=1024,
    max_position_embeddings=16384,
)
"""A decoder that prefills 4 000 tokens in a second or two on one core. Its encoder is not used."""

THIRD_OF_A_BILLION = SyntheticSize(
    text_hidden=1024,
    text_intermediate=4096,
    text_layers=18,
    text_heads=16,
    text_kv_heads=4,
    head_dim=64,
    vision_hidden=512,
    vision_intermediate=2048,
    vision_depth=8,
    vision_heads=8,
    patch_pixels=16,
    max_pixels=512 * 512,
    vocab_size=1024,
)
"""0.3 billion parameters, nearly all of them in the decoder; turns an image of 512 x 512 pixels into 256 tokens."""

GOODPUT_NAME = "qwen3_vl-goodput"
"""The checkpoint of goodput, where no other is chosen."""
GOODPUT = SyntheticSize(
    text_hidden=512,
    text_intermediate=1536,
    text_layers=4,
    text_heads=8,
    text_kv_heads=2,
    head_dim=64,
    vision_hidden=192,
    vision_intermediate=576,
    vision_depth=3,
    vision_heads=3,
    patch_pixels=16,
    max_pixels=512 * 512,
    vocab_size=1024,
    max_position_embeddings=8192,
)
"""Two cores answer about ten requests per second of text and images, and an image of 512 x 512 pixels, which has 256 tokens,
costs the encoder about as much as the decoder."""

LARGE_VOCABULARY = SyntheticSize(
    text_hidden=896,
    text_intermediate=2432,
    text_layers=4,
    text_heads=14,
    text_kv_heads=2,
    head_dim=64,
    vocab_size=151_936,
    tie_word_embeddings=True,
)
"""The width and vocabulary of the smallest Qwen2.5, with few layers, so that the head and sampling are most of a step."""

HEADS_OF_64 = SyntheticSize(
    text_hidden=256,
    text_intermediate=512,
    text_heads=4,
    text_kv_heads=2,
    head_dim=64,
    vision_hidden=128,
    vision_intermediate=256,
    vision_heads=2,
)
"""Small, with heads of the width that vLLM's CPU kernels need. Qwen2.5-VL derives that width from the hidden size."""


async def synthetic(bench: Bench, text_layers: int = TEXT_LAYERS) -> str:
    """Return the folder of a Qwen3-VL checkpoint with random weights."""
    return await make_once(bench, f"qwen3_vl-{text_layers}", size_of(text_layers))


async def make_once(bench: Bench, name: str, size: SyntheticSize, family: str = "qwen3_vl") -> str:
    """Return the folder of a checkpoint called ``name``, which is made if this run has not made it yet."""
    folder = bench.scratch / name
    if not folder.is_dir():
        bench.phase("making a synthetic checkpoint")
        await asyncio.to_thread(make_checkpoint, folder, size, family)
    return str(folder)


def make_checkpoint(folder: Path, size: SyntheticSize, family: str = "qwen3_vl") -> None:
    """Make a checkpoint with random weights. The folder appears when it is whole."""
    from chiasm.bench.synthetic import make

    logging.getLogger("transformers").setLevel(logging.ERROR)
    unfinished = folder.with_suffix(".unfinished")
    make(family, unfinished, size=size)
    unfinished.rename(folder)


# ---- a checkpoint on which encode and prefill take about the same time --------------------------------------------------


@dataclass(frozen=True)
class Alone:
    """Seconds that one image takes when nothing else runs, as the instances themselves measure it."""

    encode_seconds: float
    """Decoding the file, preprocessing, the vision tower and publishing."""
    prefill_seconds: float
    """Prefill of a prompt with that image, whose embedding is there already, up to the first token."""

    def pipelined(self, images: int) -> float:
        """Return the seconds of so many images if each is prefilled, without delay, while the next ones are encoded."""
        e, p = self.encode_seconds, self.prefill_seconds
        return e + p + (images - 1) * max(e, p)

    def all_busy(self, images: int) -> float:
        """Return the seconds of so many images if nothing waits: twice as many cores work all the time, equally well."""
        return images * (self.encode_seconds + self.prefill_seconds) / 2


async def measure_alone(bench: Bench, deployment: Deployment, name: str) -> Alone:
    """Encode a new image called ``name``, then prefill it; both instances are called directly."""
    (encoder,), (pd, *_) = deployment.urls(Role.ENCODER), deployment.urls(Role.PD)
    identifier = identifier_of(name)
    _, encoding, _ = await bench.client.post(encoder, publish(photo(name, SIDE), identifier), as_proxy=True)
    await bench.client.tell_place(pd, encoder, identifier)
    body = chat([embeds_part(identifier, SIDE), text_part(QUESTION)], max_tokens=1)
    _, prefilling, _ = await bench.client.post(pd, body, as_proxy=True)
    return Alone(encoding["preprocess"] + encoding["encode"] + encoding["publish"], prefilling["prefill"])


async def balanced_checkpoint(bench: Bench) -> str:
    """Return a synthetic checkpoint with so many decoder layers that prefill of an image is as slow as its encoding.

    Each of the two is measured on a core of its own.
    """
    layers = TEXT_LAYERS
    for attempt in range(_ATTEMPTS):
        model = await synthetic(bench, layers)
        async with running(bench, pinned(model)) as (deployment,):
            bench.phase("balancing encode and prefill")
            names = [f"balance {bench.seed} {attempt} {index}" for index in range(_ROUNDS)]
            found = [await measure_alone(bench, deployment, name) for name in names]
        encode = median([one.encode_seconds for one in found[1:]])
        prefill = median([one.prefill_seconds for one in found[1:]])
        better = max(1, min(_MOST_LAYERS, round(layers * encode / prefill)))
        if abs(prefill / encode - 1) <= _ENOUGH_ALIKE or better == layers:
            break
        layers = better
    return model
