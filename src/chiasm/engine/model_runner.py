"""Running a planned step on the language model: rows in, one token per sampling sequence out."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from chiasm.engine.attention import AttentionStep, KVCache, PrefillSegment, decode_groups
from chiasm.engine.grammar import Allowed, GrammarError, Masks, Matchers
from chiasm.engine.logit_changes import LogitChanges
from chiasm.engine.sampler import Sampled, SamplingInput, sample
from chiasm.engine.sequence import Sequence
from chiasm.engine.step import ScheduledSequence, Step
from chiasm.models.base import LanguageModel, Positions

if TYPE_CHECKING:
    from numpy.typing import NDArray


class ModelRunner:
    """Runs steps. Holds the KV cache, and what is kept of each request that runs: positions, slots, changes of logits."""

    def __init__(self, language: LanguageModel, kv_cache: KVCache, eos_token_ids: frozenset[int]) -> None:
        self.language = language
        self.kv_cache = kv_cache
        self._eos_token_ids = eos_token_ids
        self._positions: dict[str, Positions] = {}
        self._changes: dict[str, dict[int, LogitChanges]] = {}
        """By request and choice."""
        self._slots: dict[str, dict[int, _Slots]] = {}
        """By request and choice."""
        self._matchers = Matchers()

    def forget(self, request_id: str) -> None:
        """Drop what is kept of a request that ended."""
        self._positions.pop(request_id, None)
        self._changes.pop(request_id, None)
        self._slots.pop(request_id, None)
        self._matchers.forget(request_id)

    @torch.inference_mode()
    def execute(self, step: Step, encoder_cache: Mapping[str, Tensor]) -> dict[str, Sampled]:
        """Run the step; return the new token of each sequence that samples, by ``sequence_id``.

        ``encoder_cache`` has the entry ``[rows, entry_width]`` of every item that the step's chunks reach into.
        """
        device = self.language.device
        # The longest first, since those of similar length are computed together.
        decodes = sorted(step.decodes, key=lambda part: -part.end)
        parts = [*decodes, *step.prefills]
        token_ids: list[int] = []
        samplers: list[Sequence] = []
        last_rows: list[int] = []
        for part in parts:
            token_ids += part.sequence.token_ids[part.start : part.end]
            if part.samples:
                samplers.append(part.sequence)
                last_rows.append(len(token_ids) - 1)
        pending_masks = self._matchers.begin(samplers)
        entry_rows, entry_index = self._entries(step, encoder_cache)
        hidden = self.language.forward(
            torch.tensor(token_ids, device=device),
            self._position_ids(decodes, step.prefills).to(device),
            self._attention(decodes, step.prefills),
            entry_rows,
            entry_index,
        )
        if not samplers:
            return {}
        if len(samplers) < len(token_ids):
            hidden = hidden.index_select(0, torch.tensor(last_rows, device=device))
        logits = self.language.logits(hidden)
        masks: Masks = {} if pending_masks is None else pending_masks.result()
        inputs = [self._sampling_input(sequence, masks.get(row)) for row, sequence in enumerate(samplers)]
        sampled = sample(logits, inputs)
        return {sequence.sequence_id: token for sequence, token in zip(samplers, sampled, strict=True)}

    def _sampling_input(self, sequence: Sequence, allowed: Allowed | GrammarError | None) -> SamplingInput:
        changes = self._changes_of(sequence)
        return SamplingInput(
            sequence.sampling, sequence.seed, sequence.token_ids, sequence.num_prompt, changes, allowed
        )

    def _changes_of(self, sequence: Sequence) -> LogitChanges:
        of_request = self._changes.setdefault(sequence.request_id, {})
        changes = of_request.get(sequence.index)
        if changes is None:
            params = sequence.sampling
            stops = {*params.stop_token_ids, *(() if params.ignore_eos else self._eos_token_ids)}
            changes = LogitChanges(params, sequence.prompt.token_ids, stops)
            of_request[sequence.index] = changes
        return changes

    def _position_ids(self, decodes: list[ScheduledSequence], prefills: list[ScheduledSequence]) -> Tensor:
        """Return the rotary positions of all rows, int64 ``[axes, T]`` or ``[1, T]`` on the CPU: in text, axes don't differ."""
        of_prefills = [self._positions_of_chunk(part) for part in prefills]
        if not decodes:
            return torch.cat(of_prefills, dim=1)
        known = [self._positions_of(part.sequence) for part in decodes]
        ids = torch.tensor([part.start + one.delta for part, one in zip(decodes, known, strict=True)])
        return torch.cat([ids.expand(len(known[0].ids), -1), *of_prefills], dim=1) if of_prefills else ids[None]

    def _positions_of(self, sequence: Sequence) -> Positions:
        positions = self._positions.get(sequence.request_id)
        if positions is None:
            positions = self.language.positions(sequence.prompt)
            self._positions[sequence.request_id] = positions
        return positions

    def _positions_of_chunk(self, part: ScheduledSequence) -> Tensor:
        sequence, positions = part.sequence, self._positions_of(part.sequence)
        if part.end <= sequence.num_prompt:
            return positions.ids[:, part.start : part.end]
        generated = torch.arange(max(part.start, sequence.num_prompt), part.end) + positions.delta
        generated = generated.expand(positions.ids.shape[0], -1)
        if part.start >= sequence.num_prompt:
            return generated
        return torch.cat([positions.ids[:, part.start :], generated], dim=1)

    def _entries(self, step: Step, encoder_cache: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """Return the embedding rows that the step uses, and the indices of the step's rows that they replace."""
        rows: list[Tensor] = []
        index: list[int] = []
        base = len(step.decodes)
        for part in step.prefills:
            for item in part.sequence.items_between(part.start, part.end):
                positions = item.positions
                first, last = bisect_left(positions, part.start), bisect_left(positions, part.end)
                if first < last:
                    rows.append(encoder_cache[item.identifier][first:last])
                    index += [base + position - part.start for position in positions[first:last]]
            base += part.num_tokens
        if not rows:
            return None, None
        device = self.language.device
        return torch.cat(rows).to(device, self.language.dtype), torch.tensor(index, device=device)

    def _attention(self, decodes: list[ScheduledSequence], prefills: list[ScheduledSequence]) -> AttentionStep:
        device = self.language.device
        seen = [self._slots_of(part.sequence, part.end) for part in decodes]
        written = [np.array([slots[-1] for slots in seen], dtype=np.int64)]
        segments: list[PrefillSegment] = []
        row = len(decodes)
        for part in prefills:
            slots = self._slots_of(part.sequence, part.end)
            written.append(slots[part.start :])
            segments.append(PrefillSegment(row, row + part.num_tokens, torch.from_numpy(slots).to(device)))
            row += part.num_tokens
        return AttentionStep(
            self.kv_cache,
            torch.from_numpy(np.concatenate(written)).to(device),
            segments,
            decode_groups(seen, device, self.kv_cache.most_slots),
        )

    def _slots_of(self, sequence: Sequence, end: int) -> NDArray[np.int64]:
        """Return the slots of the first ``end`` tokens."""
        of_request = self._slots.setdefault(sequence.request_id, {})
        slots = of_request.setdefault(sequence.index, _Slots())
        return slots.of(sequence.block_ids, self.kv_cache)[:end]


@dataclass
class _Slots:
    """The slots of a sequence's blocks, which grow as it gets more."""

    block_ids: list[int] = field(default_factory=list)
    slots: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    def of(self, block_ids: list[int], cache: KVCache) -> NDArray[np.int64]:
        """Return the slots of these blocks; only those that weren't there the last time are computed."""
        known = len(self.block_ids)
        if self.block_ids == block_ids:
            return self.slots
        if self.block_ids != block_ids[:known]:  # it was preempted since, or gave blocks back
            known = 0
        starts = np.array(block_ids[known:], dtype=np.int64) * cache.slots_per_block
        more = (starts[:, None] + np.arange(cache.block_size, dtype=np.int64)).reshape(-1)
        self.slots = np.concatenate([self.slots[: known * cache.block_size], more])
        self.block_ids = list(block_ids)
        return self.slots
