"""Synthetic checkpoints whose sizes measurements choose, made once a run."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from chiasm.bench.measurement import Bench
from chiasm.checkpoints.synthetic import SyntheticSize

TEXT_LAYERS = 3
"""Of the decoder, before it is balanced against the encoder."""


def size_of(text_layers: int) -> SyntheticSize:
    """A vision tower that takes an image of 512 x 512 pixels as 256 tokens, and a decoder of that many layers.

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
"""0.3 billion parameters, nearly all of them the decoder's; takes an image of 512 x 512 pixels as 256 tokens."""

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
"""Small, with heads as wide as vLLM's kernels for CPU want them. Qwen2.5-VL's are as wide as its hidden size lets them be."""


async def synthetic(bench: Bench, text_layers: int = TEXT_LAYERS) -> str:
    """The folder of a Qwen3-VL checkpoint with random weights."""
    return await _made(bench, f"qwen3_vl-{text_layers}", size_of(text_layers))


async def with_long_prompts(bench: Bench) -> str:
    """The folder of one whose prompts may have thousands of tokens."""
    return await _made(bench, "qwen3_vl-long-prompts", LONG_PROMPTS)


async def third_of_a_billion(bench: Bench) -> str:
    """The folder of one as large as the smallest models in use."""
    return await _made(bench, "qwen3_vl-300m", THIRD_OF_A_BILLION)


async def with_heads_of_64(bench: Bench, family: str) -> str:
    """The folder of a small one of a Qwen family."""
    return await _made(bench, f"{family}-heads-of-64", HEADS_OF_64, family)


async def _made(bench: Bench, name: str, size: SyntheticSize, family: str = "qwen3_vl") -> str:
    folder = bench.scratch / name
    if not folder.is_dir():
        bench.step("making a synthetic checkpoint")
        await asyncio.to_thread(_make, folder, size, family)
    return str(folder)


def _make(folder: Path, size: SyntheticSize, family: str) -> None:
    from chiasm.checkpoints.synthetic import make

    logging.getLogger("transformers").setLevel(logging.ERROR)
    unfinished = folder.with_suffix(".unfinished")
    make(family, unfinished, size=size)
    unfinished.rename(folder)
