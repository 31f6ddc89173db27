"""A step that fails runs again in parts, so that only those sequences fail that fail by themselves.

One sequence may need more memory than there is: a long prompt, or a long context beside many others. It must not cost the
requests that happen to be in the same step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch

from chiasm.engine.sampler import Sampled
from chiasm.engine.step import ScheduledSequence, Step
from chiasm.errors import ChiasmError

logger = logging.getLogger(__name__)


class StepResult(NamedTuple):
    """What came of a step: the new tokens by ``sequence_id``, and what could not run, each with the reason."""

    sampled: dict[str, Sampled]
    failed: list[tuple[ScheduledSequence, ChiasmError]]


def run_step(run: Callable[[Step], dict[str, Sampled]], step: Step, *, is_part: bool = False) -> StepResult:
    """Run the step; if that fails, run its halves, and so on.

    ``run`` may be called again for the same tokens: what it has written for them is the same each time. So up to twice as
    many runs as there are sequences tell which of them fail. Those that need the most memory are tried together, since each
    decode takes as much as the longest of its batch. ``is_part`` says that the step is part of one that has failed, which has
    been logged with its traceback.
    """
    try:
        return StepResult(run(step), [])
    except Exception as error:
        if not is_part:
            logger.exception("A step of %d sequences failed.", len(step.scheduled))
        elif len(step.scheduled) == 1:
            logger.error("A sequence of %d tokens fails by itself: %s", step.scheduled[0].end, error)
        reason = _reason(error)
    # Outside of the handler, so that the tensors of the failed run are free: the error holds its frames.
    if len(step.scheduled) == 1:
        return StepResult({}, [(step.scheduled[0], reason)])
    small, large = (run_step(run, half, is_part=True) for half in _halves(step))
    return StepResult(small.sampled | large.sampled, small.failed + large.failed)


def _reason(error: Exception) -> ChiasmError:
    # On a CPU, torch raises a bare RuntimeError if there is no memory.
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
        return ChiasmError(
            "This instance has too little memory for the request; send a shorter prompt, or start the instance with a lower "
            "--kv-cache-bytes."
        )
    return ChiasmError(f"The model failed on this request: {type(error).__name__}.")


def _halves(step: Step) -> tuple[Step, Step]:
    """Return the half of the step that needs less memory, and the other."""
    by_memory = sorted(step.scheduled, key=lambda part: part.num_tokens * part.end)
    smaller = {part.sequence.sequence_id for part in by_memory[: len(by_memory) // 2]}
    halves = Step(), Step()
    for half, is_smaller in zip(halves, (True, False), strict=True):
        half.decodes = [part for part in step.decodes if (part.sequence.sequence_id in smaller) is is_smaller]
        half.prefills = [part for part in step.prefills if (part.sequence.sequence_id in smaller) is is_smaller]
    return halves
