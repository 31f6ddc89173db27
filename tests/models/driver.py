"""Runs a language model over a paged cache: chunked prefill and decode, with several requests in a step."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from chiasm.engine.attention import MOST_SLOTS, AttentionStep, KVCache, PrefillSegment, decode_groups
from chiasm.models.base import LanguageModel, Positions, Prompt

BLOCK_SIZE = 4


@dataclass
class Request:
    prompt: Prompt
    entries: Sequence[Tensor]
    positions: Positions
    slots: Tensor
    """The slot of each token in the cache; the blocks are not contiguous."""
    computed: int = 0
    generated: list[int] = field(default_factory=list)

    @property
    def is_decoding(self) -> bool:
        return self.computed >= len(self.prompt.token_ids)


class Driver:
    """Decodes greedily."""

    def __init__(self, language: LanguageModel, *, num_blocks: int = 256) -> None:
        self._language = language
        self._cache = KVCache(language, num_blocks=num_blocks, block_size=BLOCK_SIZE)
        self._free = list(range(num_blocks))
        random.Random(0).shuffle(self._free)

    def add(self, prompt: Prompt, entries: Sequence[Tensor], *, max_tokens: int = 32) -> Request:
        blocks = [self._free.pop() for _ in range((len(prompt.token_ids) + max_tokens) // BLOCK_SIZE + 1)]
        slots = (torch.tensor(blocks)[:, None] * self._cache.slots_per_block + torch.arange(BLOCK_SIZE)).flatten()
        return Request(prompt, entries, self._language.positions(prompt), slots)

    def step(self, requests: Sequence[Request], chunk: int) -> None:
        """Compute one token for each request that decodes, and at most ``chunk`` rows for each that prefills."""
        decodes = [request for request in requests if request.is_decoding]
        decodes.sort(key=lambda request: -request.computed)
        prefills = [request for request in requests if not request.is_decoding]
        tokens: list[int] = []
        positions: list[Tensor] = []
        slots: list[Tensor] = []
        rows: list[Tensor] = []
        row_index: list[int] = []
        segments: list[PrefillSegment] = []
        for request in decodes:
            tokens.append(request.generated[-1])
            positions.append(
                torch.full((request.positions.ids.shape[0], 1), request.computed + request.positions.delta)
            )
            slots.append(request.slots[request.computed : request.computed + 1])
        for request in prefills:
            start = request.computed
            end = min(start + chunk, len(request.prompt.token_ids))
            for item, entry in zip(request.prompt.items, request.entries, strict=True):
                for row, position in enumerate(item.positions):
                    if start <= position < end:
                        rows.append(entry[row])
                        row_index.append(len(tokens) + position - start)
            segments.append(PrefillSegment(len(tokens), len(tokens) + end - start, request.slots[:end]))
            tokens += request.prompt.token_ids[start:end]
            positions.append(request.positions.ids[:, start:end])
            slots.append(request.slots[start:end])
        seen = [request.slots[: request.computed + 1].numpy() for request in decodes]
        attention = AttentionStep(
            self._cache, torch.cat(slots), segments, decode_groups(seen, torch.device("cpu"), MOST_SLOTS)
        )
        hidden = self._language.forward(
            torch.tensor(tokens),
            torch.cat(positions, dim=1),
            attention,
            torch.stack(rows) if rows else None,
            torch.tensor(row_index) if rows else None,
        )
        last_rows = [*range(len(decodes)), *(segment.end - 1 for segment in segments)]
        sampled = self._language.logits(hidden[last_rows]).argmax(dim=-1).tolist()
        for request, token in zip([*decodes, *prefills], sampled, strict=True):
            request.computed += 1 if request.generated else min(chunk, len(request.prompt.token_ids) - request.computed)
            if request.is_decoding:
                request.generated.append(token)

    def generate(self, prompt: Prompt, entries: Sequence[Tensor], *, chunk: int, max_tokens: int) -> list[int]:
        request = self.add(prompt, entries)
        while len(request.generated) < max_tokens:
            self.step([request], chunk)
        return request.generated
