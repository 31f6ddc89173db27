"""A language instance of the simulation: the engine's own scheduler, whose steps are counted instead of computed.

This is the only file of the package that knows the scheduler. Tokens are made up, so that a prompt shares its prefix with
another exactly as far as both have the same images at the same places.
"""

from __future__ import annotations

import itertools
from collections.abc import Container
from dataclasses import dataclass, field
from functools import lru_cache

from chiasm.due import due
from chiasm.engine.block_manager import BlockManager
from chiasm.engine.encoder_cache_manager import EncoderCacheManager
from chiasm.engine.fluency import Fluency
from chiasm.engine.pace import Pace, prompt_work
from chiasm.engine.request import SamplingParams
from chiasm.engine.scheduler import Scheduler, SchedulerConfig
from chiasm.engine.sequence import Sequence
from chiasm.engine.step import Step
from chiasm.errors import ChiasmError
from chiasm.models.base import ItemGeometry, Prompt, PromptItem
from chiasm.plan.costs import StepShape
from chiasm.wire import Costs, Role

_HEAD_TOKENS = 4
"""What a chat template writes before the first image."""
_HEAD, _PLACEHOLDER = -1, -2


@dataclass(frozen=True)
class Item:
    """An image as a language instance sees it."""

    identifier: str
    tokens: int


@dataclass(frozen=True)
class LanguageLimits:
    """What a language instance has room for."""

    num_blocks: int
    block_size: int
    max_model_len: int
    max_num_batched_tokens: int
    max_prefill_tokens: int
    max_rest_tokens: int
    device_type: str
    """``cpu`` or ``cuda``."""
    min_text_before_item: int
    max_num_seqs: int
    max_queued_requests: int
    encoder_cache_bytes: int
    entry_bytes_per_row: int


@dataclass
class StepOutcome:
    """What a step brought about, by names of requests."""

    tokens: list[str] = field(default_factory=list)
    """Those that got a token."""
    prompt_seconds: dict[str, float] = field(default_factory=dict)
    """What each prompt took of it."""
    ended: list[str] = field(default_factory=list)
    """Those whose answer, or whose part of it, has ended."""


@dataclass(frozen=True)
class PlannedStep:
    """A step that is to run."""

    step: Step
    shape: StepShape
    load: tuple[str, ...] = ()
    """Requests whose KV may now come from the prefill instance."""

    @property
    def runs(self) -> bool:
        """Whether there is anything to compute."""
        return self.shape.rows > 0

    @property
    def prefills(self) -> bool:
        """Whether it computes parts of prompts."""
        return bool(self.step.prefills)


class LanguageInstance:
    """One PD, prefill, decode or aggregated instance. Knows no clock."""

    def __init__(self, role: Role, limits: LanguageLimits, costs: Costs) -> None:
        """``costs`` are what the instance measured at start."""
        self.role = role
        self.limits = limits
        self._scheduler = Scheduler(
            SchedulerConfig(
                max_num_batched_tokens=limits.max_num_batched_tokens,
                max_num_seqs=limits.max_num_seqs,
                max_queued_requests=limits.max_queued_requests,
                max_prefill_tokens=limits.max_prefill_tokens,
                max_rest_tokens=limits.max_rest_tokens,
                min_text_before_item=limits.min_text_before_item,
                entry_bytes_per_row=limits.entry_bytes_per_row,
                recomputes_items=role is not Role.DECODE,
            ),
            BlockManager(limits.num_blocks, limits.block_size),
            EncoderCacheManager(limits.encoder_cache_bytes),
        )
        self._sequences: dict[str, Sequence] = {}
        self._arrivals = itertools.count()
        self._pace = Pace(costs.prefill_seconds_per_token)
        self._fluency = Fluency(limits.device_type, costs)

    @property
    def preemptions(self) -> int:
        return self._scheduler.num_preemptions

    def add(self, name: str, prompt: Prompt, answer_tokens: int, *, now: float, remote: bool = False) -> bool:
        """Queue a request; with ``remote``, one whose prompt and first token were computed by a prefill instance.

        Return False if it is refused: it doesn't fit, or too many wait already.
        """
        if len(prompt.token_ids) + answer_tokens > self.limits.max_model_len:
            return False
        sequence = Sequence(
            request_id=name,
            index=0,
            arrival=next(self._arrivals),
            due=due(now, prompt_work(prompt) * self._pace.seconds_per_token),
            prompt=prompt,
            sampling=SamplingParams(max_tokens=answer_tokens),
            seed=0,
            block_size=self.limits.block_size,
            output_token_ids=(0,) if remote else (),
            num_remote=len(prompt.token_ids) if remote else 0,
        )
        try:
            self._scheduler.items.check(list(prompt.items))
            self._scheduler.add([sequence])
        except ChiasmError:
            return False
        self._sequences[name] = sequence
        return True

    def plan(self, stored: Container[str], now: float) -> PlannedStep:
        """Take in the embeddings among ``stored`` that are wanted, and plan the step that begins at ``now``."""
        scheduler = self._scheduler
        for sequence, items in scheduler.wanted_items():
            for item in items:
                if item.identifier not in scheduler.encoder_cache and (
                    item.identifier not in stored or not scheduler.items.make_room(sequence, item)
                ):
                    break
                scheduler.item_arrived(sequence, item)
        step = scheduler.schedule(self._fluency.prefill_rows(now))
        scheduler.encoder_cache.take_evicted()
        for sequence in step.put_back:  # a copy within the instance takes next to no time
            scheduler.loaded(sequence)
        decode_keys = sum(part.end for part in step.decodes)
        pairs = sum(part.num_tokens * (part.start + part.num_tokens / 2) for part in step.prefills)
        rows = sum(part.num_tokens for part in step.scheduled)
        return PlannedStep(
            step,
            StepShape(rows, pairs, decode_keys),
            load=tuple(sequence.request_id for sequence in step.load),
        )

    def due_of(self, name: str) -> float:
        """Return when the work of a request is due that is here."""
        return self._sequences[name].due

    def complete(self, planned: PlannedStep, seconds: float, now: float) -> StepOutcome:
        """Note that the step ended at ``now``, and how long it took."""
        outcome = StepOutcome()
        if planned.step.prefills:
            self._pace.note(planned.shape.rows, seconds)
            outcome.prompt_seconds = self._fluency.prompt_seconds(planned.step, seconds)
        samples = [part.sequence for part in planned.step.scheduled if part.samples and not part.sequence.finished]
        self._scheduler.complete(planned.step, {sequence.sequence_id: 0 for sequence in samples})
        for sequence in samples:
            outcome.tokens.append(sequence.request_id)
            if self.role is Role.PREFILL or sequence.num_output >= sequence.sampling.max_tokens:
                self._end(sequence, leave_blocks=self.role is Role.PREFILL and sequence.sampling.max_tokens > 1)
                outcome.ended.append(sequence.request_id)
        self._fluency.note(planned.step, seconds, now)
        return outcome

    def loaded(self, name: str) -> None:
        """Note that the KV of a request is here."""
        self._scheduler.loaded(self._sequences[name])

    def blocks_read(self, name: str) -> None:
        """Free what a prefill instance has held for a decode instance."""
        self._scheduler.blocks_read(name)

    def abort(self, name: str) -> None:
        """End a request that nobody waits for any more, if it is here."""
        sequence = self._sequences.get(name)
        if sequence is not None:
            self._end(sequence)

    def _end(self, sequence: Sequence, *, leave_blocks: bool = False) -> None:
        self._scheduler.finish(sequence, leave_blocks=leave_blocks)
        del self._sequences[sequence.request_id]


def made_up_prompt(index: int, items: list[Item], text_tokens: int) -> Prompt:
    """Return a prompt: the template's first tokens, the images, and a text like no other request's."""
    head = min(_HEAD_TOKENS, text_tokens)
    token_ids = [_HEAD] * head
    placed: list[PromptItem] = []
    for item in items:
        placed.append(PromptItem(item.identifier, len(token_ids), item.tokens, _geometry(item.tokens)))
        token_ids += [_PLACEHOLDER] * item.tokens
    first = index << 24
    token_ids.extend(range(first, first + text_tokens - head))
    return Prompt(token_ids or [first], placed)


@lru_cache(maxsize=1024)
def _geometry(tokens: int) -> ItemGeometry:
    return ItemGeometry((_PLACEHOLDER,) * tokens, tuple(range(tokens)), {})
