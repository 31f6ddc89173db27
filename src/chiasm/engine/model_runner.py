"""Running a planned step on the language model: rows in, one token per sampling sequence out."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping

import torch
from torch import Tensor

from chiasm.engine.attention import AttentionStep, KVCache, PrefillSegment
from chiasm.engine.grammar import Allowed, GrammarError, Masks, Matchers
from chiasm.engine.logit_changes import LogitChanges
from chiasm.engine.sampler import Sampled, SamplingInput, sample
from chiasm.engine.scheduler import ScheduledSequence, Step
from chiasm.engine.sequence import Sequence
from chiasm.models.base import LanguageModel, Positions


class ModelRunner:
    """Runs steps. Holds the KV cache, and what is made once for each request that runs: rotary positions, changes of logits."""

    def __init__(self, language: LanguageModel, kv_cache: KVCache, eos_token_ids: frozenset[int]) -> None:
        self.language = language
        self.kv_cache = kv_cache
        self._eos_token_ids = eos_token_ids
        self._positions: dict[str, Positions] = {}
        self._changes: dict[str, dict[int, LogitChanges]] = {}
        """By request and choice."""
        self._matchers = Matchers()

    def forget(self, request_id: str) -> None:
        """Drop what is kept of a request that ended."""
        self._positions.pop(request_id, None)
        self._changes.pop(request_id, None)
        self._matchers.forget(request_id)

    @torch.inference_mode()
    def execute(self, step: Step, encoder_cache: Mapping[str, Tensor]) -> dict[str, Sampled]:
        """Run the step; return the new token of each sequence that samples, by ``sequence_id``.

        ``encoder_cache`` has the entry ``[rows, entry_width]`` of every item that the step's chunks reach into.
        """
        device = self.language.device
        parts = step.scheduled
        token_ids: list[int] = []
        samplers: list[Sequence] = []
        last_rows: list[int] = []
        for part in parts:
            token_ids += part.sequence.token_ids[part.start : part.end]
            if part.samples:
                samplers.append(part.sequence)
                last_rows.append(len(token_ids) - 1)
        pending_masks = self._matchers.begin(samplers)
        position_ids = torch.cat([self._position_ids(part) for part in parts], dim=1)
        entry_rows, entry_index = self._entries(step, encoder_cache)
        hidden = self.language.forward(
            torch.tensor(token_ids, device=device),
            position_ids.to(device),
            self._attention(step),
            entry_rows,
            entry_index,
        )
        if not samplers:
            return {}
        logits = self.language.logits(hidden[torch.tensor(last_rows, device=device)])
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

    def _position_ids(self, part: ScheduledSequence) -> Tensor:
        sequence = part.sequence
        positions = self._positions.get(sequence.request_id)
        if positions is None:
            positions = self.language.positions(sequence.prompt)
            self._positions[sequence.request_id] = positions
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

    def _attention(self, step: Step) -> AttentionStep:
        device = self.language.device
        block_size, slots_per_block = self.kv_cache.block_size, self.kv_cache.slots_per_block
        offsets = torch.arange(block_size)

        def slots_of(sequence: Sequence, end: int) -> Tensor:
            blocks = torch.tensor(sequence.block_ids[: -(-end // block_size)])
            return (blocks[:, None] * slots_per_block + offsets).flatten()[:end]

        written: list[Tensor] = []
        decode_slots = decode_lengths = None
        if step.decodes:
            lengths = [part.end for part in step.decodes]
            seen = [slots_of(part.sequence, part.end) for part in step.decodes]
            written += [slots[-1:] for slots in seen]
            decode_slots = torch.nn.utils.rnn.pad_sequence(seen, batch_first=True).to(device)
            decode_lengths = torch.tensor(lengths, device=device)
        prefills: list[PrefillSegment] = []
        row = len(step.decodes)
        for part in step.prefills:
            slots = slots_of(part.sequence, part.end)
            written.append(slots[part.start :])
            prefills.append(PrefillSegment(row, row + part.num_tokens, slots.to(device)))
            row += part.num_tokens
        return AttentionStep(self.kv_cache, torch.cat(written).to(device), prefills, decode_slots, decode_lengths)
