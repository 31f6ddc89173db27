"""What work costs an engine: a few measurements at start, which also warm it up.

Each takes a fraction of a second, whatever the model: the work grows until it has taken long enough to judge by. On a CPU it
computes on one core and counts CPU time, so that instances that start at the same time disturb each other little. The figures
are where the proxy begins; what requests take corrects them.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import torch
from PIL import Image

from chiasm.engine.block_manager import BlockManager
from chiasm.engine.encoder_cache_manager import EncoderCacheManager
from chiasm.engine.fluency import slowdown_beside_streams
from chiasm.engine.request import SamplingParams
from chiasm.engine.scheduler import Scheduler, SchedulerConfig
from chiasm.engine.sequence import Sequence
from chiasm.errors import InvalidRequestError
from chiasm.models.base import Pixels, Processor, Prompt
from chiasm.wire import Costs, ImageCost

if TYPE_CHECKING:
    from chiasm.engine.model_runner import ModelRunner

_SIDES = (256, 512, 1024, 2048)
"""Sides in pixels of the square images that are encoded."""
_PROMPTS = (32, 128, 256)
"""Tokens of the prompts that are prefilled."""
_STEPS = 4
ENOUGH_SECONDS = 0.25
"""Larger work is not tried after work that took this long; it is taken to cost as much per token."""


@contextmanager
def _clock(device: torch.device) -> Iterator[Callable[[], float]]:
    """A block to measure in, on one core of a CPU; gives the clock, in seconds."""
    if device.type != "cpu":
        yield time.perf_counter
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield time.thread_time
    finally:
        torch.set_num_threads(threads)


def encode_seconds(costs: Costs | None, tokens: int) -> float:
    """Return about what encoding an image of so many tokens takes; infinite if it is unknown."""
    if costs is None or not costs.images:
        return math.inf
    largest = costs.images[-1]
    return largest.encode_seconds * tokens / max(1, largest.tokens)


def image_tokens(processor: Processor) -> list[ImageCost]:
    """Return the tokens of images of some sizes; what encoding them costs is left out."""
    found = []
    for side in _SIDES:
        with suppress(InvalidRequestError):
            tokens = len(processor.geometry_of_size(side, side).token_ids)
            found.append(ImageCost(pixels=side * side, tokens=tokens))
    return found


def image_costs(processor: Processor, device: torch.device, encode: Callable[[Pixels], object]) -> list[ImageCost]:
    """Return what images of some sizes cost; ``encode`` returns when an image is encoded."""
    found: list[ImageCost] = []
    measured: ImageCost | None = None
    for one in image_tokens(processor):
        if measured is None or (measured.encode_seconds < ENOUGH_SECONDS and measured.tokens < one.tokens):
            seconds = min(_encode_seconds(processor, device, encode, math.isqrt(one.pixels)) for _ in range(2))
            measured = msgspec.structs.replace(one, encode_seconds=seconds)
        else:
            seconds = measured.encode_seconds * one.tokens / max(1, measured.tokens)
        found.append(msgspec.structs.replace(one, encode_seconds=seconds))
    return found


def _encode_seconds(processor: Processor, device: torch.device, encode: Callable[[Pixels], object], side: int) -> float:
    file = io.BytesIO()
    pixels = np.random.default_rng(side).integers(0, 256, (side // 16, side // 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((side, side)).save(file, "JPEG")
    with _clock(device) as clock, Image.open(file) as image:
        started = clock()
        encode(processor.preprocess(image.convert("RGB")))
        return clock() - started


def language_costs(processor: Processor, runner: ModelRunner, max_model_len: int) -> Costs:
    """Return what prefill and decode cost, and the tokens of images. The engine must have nothing else to do.

    It uses the first blocks of the KV cache and leaves nothing behind that a request could find.
    """
    per_token = step = 0.0
    for tokens in _PROMPTS:
        if tokens + _STEPS > max_model_len or tokens + _STEPS > runner.kv_cache.num_blocks * runner.kv_cache.block_size:
            break
        prefill, *steps = step_seconds(processor, runner, tokens)
        per_token, step = prefill / tokens, min(steps)
        if prefill > ENOUGH_SECONDS:
            break
    costs = Costs(
        prefill_seconds_per_token=per_token,
        decode_step_seconds=step,
        images=image_tokens(processor),
    )
    return msgspec.structs.replace(costs, beside_streams=slowdown_beside_streams(runner.language.device.type, costs))


def step_seconds(processor: Processor, runner: ModelRunner, tokens: int, steps: int = _STEPS) -> list[float]:
    """Return the seconds of each step that a prompt of so many tokens and as many tokens of its answer as ``steps`` take.

    On a CPU they are CPU time on one core.
    """
    cache = runner.kv_cache
    scheduler = Scheduler(
        SchedulerConfig(
            max_num_batched_tokens=tokens,
            min_text_before_item=0,
            max_num_seqs=1,
            max_queued_requests=1,
            max_prefill_tokens=tokens,
            max_rest_tokens=0,
            entry_bytes_per_row=1,
        ),
        BlockManager(cache.num_blocks, cache.block_size),
        EncoderCacheManager(0),
    )
    sequence = Sequence(
        request_id="calibration",
        index=0,
        arrival=0,
        prompt=Prompt([min(processor.eos_token_ids)] * tokens),
        sampling=SamplingParams(temperature=0.0, max_tokens=steps, ignore_eos=True),
        seed=0,
        block_size=cache.block_size,
    )
    scheduler.add([sequence])
    found = []
    for _ in range(steps):
        planned = scheduler.schedule()
        with _clock(runner.language.device) as clock:
            started = clock()
            sampled = runner.execute(planned, {})
            found.append(clock() - started)
        scheduler.complete(planned, {name: token.token_id for name, token in sampled.items()})
    runner.forget(sequence.request_id)
    return found
