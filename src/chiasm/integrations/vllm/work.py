"""What one of vLLM's engines has to do and what its steps cost, counted beside its scheduler as the built-in engine counts it.

What it has to do is the work which has not been done, priced by what work has cost lately. The scheduler knows both: how much
of each prompt is computed and which images are encoded, and when a step begins and ends. ``prompt_work.py`` divides what a step
costs among its requests.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from chiasm.engine.pace import Pace
from chiasm.integrations.vllm import check_version
from chiasm.integrations.vllm.messages import LOAD_METHOD, TELL_WORK_METHOD
from chiasm.integrations.vllm.prompt_work import PromptWork
from chiasm.wire import Load

_MAX_STEPS = 64
"""Steps under way that are remembered. vLLM has about two."""
_ATTRIBUTE = "chiasm_work"
_tellers: list[Callable[[Any, Iterable[Any]], None]] = []


@functools.cache
def watch() -> None:
    """Have each scheduler that this process makes count its work, and its engine tell it to vLLM's HTTP server when asked.

    Raises ConfigurationError for a version of vLLM whose scheduler isn't known.
    """
    import vllm
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore

    check_version(vllm.__version__)
    schedule, update = Scheduler.schedule, Scheduler.update_from_output

    @functools.wraps(schedule)
    def watched_schedule(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        step = schedule(scheduler, *args, **kwargs)
        work_of(scheduler).begin(step)
        return step

    @functools.wraps(update)
    def watched_update(scheduler: Any, step: Any, *args: Any, **kwargs: Any) -> Any:
        work = work_of(scheduler)
        work.end(step)
        outputs = update(scheduler, step, *args, **kwargs)
        work.prompts.tell(outputs.values())
        for tell in _tellers:
            tell(scheduler, outputs.values())
        return outputs

    def tell_work(engine: Any) -> None:
        work_of(engine.scheduler).prompts.is_wanted = True

    Scheduler.schedule, Scheduler.update_from_output = watched_schedule, watched_update
    setattr(EngineCore, TELL_WORK_METHOD, tell_work)
    setattr(EngineCore, LOAD_METHOD, lambda engine: msgspec.json.encode(work_of(engine.scheduler).load()).decode())


def tell_with_outputs(tell: Callable[[Any, Iterable[Any]], None]) -> None:
    """Have each scheduler of this process also call this, with itself and its outputs, before it hands them out."""
    watch()
    _tellers.append(tell)


def work_of(scheduler: Any) -> EngineWork:
    """Return what counts the work of a scheduler."""
    work = getattr(scheduler, _ATTRIBUTE, None)
    if not isinstance(work, EngineWork):
        work = EngineWork(scheduler, scheduler.vllm_config.ec_transfer_config)
        setattr(scheduler, _ATTRIBUTE, work)
    return work


@dataclass
class _Step:
    """One step that is under way."""

    step: Any
    began: float
    work: int
    """Tokens of prompts that it computes, and rows of images that it encodes; vLLM counts them as done already."""
    rows: int
    """All that it computes."""
    decodes: int
    """Requests whose prompts were computed before."""
    prompts: dict[str, int]
    """Rows of each prompt and its images, by request."""
    computed: list[str]
    """Requests whose prompts are computed with it."""


class EngineWork:
    """Counts the work of one scheduler of vLLM."""

    def __init__(self, scheduler: Any, ec_config: Any, clock: Callable[[], float] = time.monotonic) -> None:
        """``ec_config`` is vLLM's ``ECTransferConfig``; None for an instance that does everything itself."""
        self._scheduler = scheduler
        self._encodes = ec_config is None or ec_config.is_ec_producer
        self._computes_prompts = ec_config is None or ec_config.is_ec_consumer
        self._clock = clock
        self._pace = Pace()
        self.prompts = PromptWork()
        self._steps: deque[_Step] = deque(maxlen=_MAX_STEPS)
        self._ended_at = 0.0

    def begin(self, step: Any) -> None:
        """Note that a step (vLLM's ``SchedulerOutput``) has been planned."""
        rows = prompt_rows = image_rows = 0
        prompts: dict[str, int] = {}
        computed: list[str] = []
        if self._computes_prompts:
            rows = step.total_num_scheduled_tokens
            drafts = sum(map(len, step.scheduled_spec_decode_tokens.values()))
            # A running answer has one row, and one for each token of a draft.
            prompt_rows = max(0, rows - drafts - len(step.num_scheduled_tokens))
            if prompt_rows:
                prompts, computed = self._prompts_in(step)
        for request_id, indices in step.scheduled_encoder_inputs.items():
            request = self._scheduler.requests[request_id]
            encoded = sum(request.mm_features[index].mm_position.get_num_embeds() for index in indices)
            image_rows += encoded
            prompts[request_id] = prompts.get(request_id, 0) + encoded
        decodes = len(step.num_scheduled_tokens.keys() - prompts.keys()) if self._computes_prompts else 0
        self._steps.append(
            _Step(step, self._clock(), prompt_rows + image_rows, rows + image_rows, decodes, prompts, computed)
        )

    def end(self, step: Any) -> None:
        """Note that a step has been computed. Steps may overlap, and end in the order in which they began."""
        now = self._clock()
        while self._steps:
            ended = self._steps.popleft()
            if ended.step is step:
                seconds = now - max(ended.began, self._ended_at)
                if ended.work:
                    self._pace.note(ended.rows, seconds)
                self.prompts.note(ended.prompts, ended.decodes, seconds, ended.computed)
                break
        self._ended_at = now
        self.prompts.forget_others(self._scheduler.requests)

    def _prompts_in(self, step: Any) -> tuple[dict[str, int], list[str]]:
        """Return the rows of each prompt in a step, and the requests whose prompts are computed with it.

        vLLM has added the step to the computed tokens of its requests.
        """
        prompts: dict[str, int] = {}
        computed: list[str] = []
        for request_id, count in step.num_scheduled_tokens.items():
            request = self._scheduler.requests[request_id]
            left = request.num_prompt_tokens - (request.num_computed_tokens - count)
            if left > 0:
                prompts[request_id] = min(count, left)
                if count >= left:
                    computed.append(request_id)
        return prompts, computed

    def load(self) -> Load:
        """Return what there is to do. Called between two steps."""
        left = sum(step.work for step in self._steps)
        images: dict[str, int] = {}
        for request in self._scheduler.requests.values():
            computed = request.num_computed_tokens
            if self._computes_prompts:
                left += max(0, request.num_prompt_tokens - computed)
            for feature in request.mm_features if self._encodes else ():
                place = feature.mm_position
                if place.offset + place.length > computed:
                    images[feature.identifier] = place.get_num_embeds()
        known = self._scheduler.encoder_cache_manager.cached
        left += sum(rows for identifier, rows in images.items() if identifier not in known)
        return Load(
            outstanding_seconds=left * self._pace.seconds_per_token,
            kv_blocks_free=self._free_blocks() if self._computes_prompts else None,
        )

    def _free_blocks(self) -> int:
        return int(self._scheduler.kv_cache_manager.block_pool.get_num_free_blocks())
